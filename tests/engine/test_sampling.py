from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from naive_sampling import drawn, kept, penalise
from pagedserve_engine.request import SamplingParams
from pagedserve_engine.sampling import (
    BANNED,
    PROMPT_SEEN,
    Allowed,
    Entries,
    LogprobRows,
    Penalties,
    Randomness,
    SamplingTensors,
    sample,
    token_logprobs,
)
from pagedserve_engine.sampling_filters import Filters, floors_by_bisection, floors_by_candidates

VOCAB = 300


def random_logits(rows: int, *, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def column(values: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype).reshape(-1, 1)


def randomness(uniform: npt.ArrayLike, *, temperature: float = 1.0, filters: Filters | None = None) -> Randomness:
    numbers = column(np.asarray(uniform, dtype=np.float64), torch.float64)
    return Randomness(None, torch.full_like(numbers, 1 / temperature, dtype=torch.float32), numbers, filters)


def entries(triples: list[tuple[int, int, float]]) -> Entries:
    rows, ids, values = zip(*triples, strict=True)
    return Entries(torch.tensor(rows), torch.tensor(ids), torch.tensor(values))


def pack_bits(allowed: npt.NDArray[np.bool_]) -> torch.Tensor:
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=1, bitorder="little").view(np.int32))


# --- greedy ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [5, 300, 49_152, 262_144])
def test_greedy_ties_go_to_the_lowest_id(dtype: torch.dtype, vocab: int) -> None:
    for first, second in ((0, vocab - 1), (1, 2), (vocab // 2, vocab // 2 + 1), (vocab // 3, vocab - 1)):
        logits = torch.zeros(2, vocab, dtype=dtype)
        logits[:, [first, second]] = 7.0
        assert sample(logits, SamplingTensors()).token_ids.tolist() == [first, first]


def test_a_greedy_row_beside_a_random_one_takes_its_likeliest_token() -> None:
    logits = random_logits(3)
    random = Randomness(torch.tensor([1]), column([1.0]), column([0.5], torch.float64))
    token_ids = sample(logits, SamplingTensors(random=random)).token_ids
    assert token_ids[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    assert token_ids[1] == drawn(np.exp(logits[1].double().numpy()), 0.5)


def test_the_logits_are_left_as_they_are() -> None:
    logits = random_logits(2)
    before = logits.clone()
    tensors = SamplingTensors(
        bias=entries([(0, 3, 5.0)]), bans=entries([(1, 3, BANNED)]), random=randomness([0.1, 0.9], temperature=0.5)
    )
    sample(logits, tensors)
    assert torch.equal(logits, before)


# --- grammar, bans, bias, penalties ----------------------------------------------------------------------------------


def test_a_grammar_mask_leaves_only_what_it_allows() -> None:
    allowed = np.zeros((1, VOCAB), dtype=bool)
    allowed[0, [7, 31, 32, 299]] = True
    mask = Allowed(torch.tensor([1]), pack_bits(allowed))
    logits = random_logits(2)
    for number in np.linspace(0, 0.999, 20):
        token_ids = sample(logits, SamplingTensors(allowed=mask, random=randomness([number, number]))).token_ids
        assert int(token_ids[1]) in {7, 31, 32, 299}
    greedy = sample(logits, SamplingTensors(allowed=mask)).token_ids
    assert int(greedy[1]) == max((7, 31, 32, 299), key=lambda token: float(logits[1, token]))
    assert int(greedy[0]) == int(logits[0].argmax())


def test_a_banned_token_never_comes_unless_the_grammar_allows_no_other() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[:, 2] = 50.0
    allowed = np.zeros((1, VOCAB), dtype=bool)
    allowed[0, 2] = True
    bans = entries([(0, 2, BANNED), (1, 2, BANNED)])
    for random in (None, randomness([0.7, 0.7])):
        tensors = SamplingTensors(allowed=Allowed(torch.tensor([1]), pack_bits(allowed)), bans=bans, random=random)
        first, second = sample(logits, tensors).token_ids.tolist()
        assert first != 2
        assert second == 2


def test_a_row_that_allows_nothing_still_yields_a_token() -> None:
    nothing = Allowed(torch.tensor([0]), pack_bits(np.zeros((1, VOCAB), dtype=bool)))
    for random in (None, randomness([0.999])):
        assert sample(random_logits(1), SamplingTensors(allowed=nothing, random=random)).token_ids.tolist() == [0]


def test_bias_moves_single_scores() -> None:
    logits = torch.zeros(2, VOCAB)
    tensors = SamplingTensors(bias=entries([(0, 5, 1.0), (0, 9, 2.0), (1, 5, -100.0), (1, 299, 0.5)]))
    assert sample(logits, tensors).token_ids.tolist() == [9, 299]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    repetition=st.floats(0.2, 3.0),
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    bias=st.dictionaries(st.integers(0, 29), st.floats(-5, 5), max_size=5),
    prompt=st.lists(st.integers(0, 29), min_size=1, max_size=10),
    output=st.lists(st.integers(0, 29), max_size=20),
)
def test_penalties_and_bias_equal_their_definition(
    *,
    seed: int,
    repetition: float,
    frequency: float,
    presence: float,
    bias: dict[int, float],
    prompt: list[int],
    output: list[int],
) -> None:
    logits = random_logits(2, vocab=30, seed=seed)
    counts = np.bincount(output, minlength=30).astype(np.int32) if output else np.zeros(30, np.int32)
    counts[prompt] |= PROMPT_SEEN
    # The counts lie in row 1 of their tensor, the request in row 1 of the batch; row 0 has neither.
    penalties = Penalties(
        rows=torch.tensor([1]),
        counts=torch.from_numpy(np.stack([np.full(30, 9, np.int32), counts])),
        count_rows=torch.tensor([1]),
        repetition=column([repetition]),
        frequency=column([frequency]),
        presence=column([presence]),
    )
    params = SamplingParams(
        repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, logit_bias=bias
    )
    biases = entries([(1, token, value) for token, value in bias.items()]) if bias else None
    token_ids = sample(logits, SamplingTensors(bias=biases, penalties=penalties)).token_ids.tolist()
    expected = penalise(logits[1].double().numpy(), params, prompt, output)
    assert token_ids[0] == int(logits[0].argmax())
    assert expected[token_ids[1]] == pytest.approx(expected.max(), abs=1e-4)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = random_logits(1)
    seen = torch.tensor([[3, 4, 5, 250, 3]])
    counts = torch.zeros(1, VOCAB, dtype=torch.int32)
    counts[0, seen] = PROMPT_SEEN
    one, zero = column([1.0]), column([0.0])
    penalties = Penalties(torch.tensor([0]), counts, torch.tensor([0]), one * 1.7, zero, zero)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits.clone())
    weights = np.exp(expected[0].double().numpy())
    for number in np.linspace(0.01, 0.99, 25):
        tensors = SamplingTensors(penalties=penalties, random=randomness([number]))
        assert int(sample(logits, tensors).token_ids) == drawn(weights, number)


# --- filters ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    top_k=st.integers(0, 70),
    top_p=st.integers(0, 16),
    min_p=st.integers(0, 40),
)
def test_filters_keep_what_a_sort_would(weights: list[int], top_k: int, top_p: int, min_p: int) -> None:
    # Multiples of a power of two add up exactly, so that no rounding hides behind a border; ties are frequent.
    row = np.array([*weights, 64], dtype=np.float64) / 64
    vocab = len(row)
    filters = Filters(
        rows=None,
        top_k=column([top_k if 0 < top_k < vocab else vocab], torch.int64),
        top_p=column([top_p / 16], torch.float64),
        min_p=column([min_p / 64]),
    )
    tensor = torch.from_numpy(row).float().unsqueeze(0)
    expected = kept(row, top_k=top_k, top_p=top_p / 16, min_p=min_p / 64)
    assert filters.min_p is not None
    for find in (floors_by_candidates, floors_by_bisection):
        floor = find(tensor, filters.min_p, filters)
        # What weighs nothing is never drawn, kept or not.
        assert np.array_equal((tensor >= floor).numpy()[0] & (row > 0), expected & (row > 0)), find.__name__


@pytest.mark.parametrize("scale", [0.1, 3.0, 20.0], ids=["flat", "as models", "peaked"])
def test_filters_agree_on_a_real_vocabulary_whether_few_or_all_tokens_must_be_looked_at(scale: float) -> None:
    logits = random_logits(4, vocab=20_000, scale=scale)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    top_k, top_p = [20_000, 50, 3_000, 1], [0.9, 0.95, 0.5, 1.0]
    filters = Filters(None, column(top_k, torch.int64), column(top_p, torch.float64), None)
    floor = torch.zeros(4, 1)
    found = floors_by_candidates(weights, floor, filters)
    for row in range(4):
        expected = kept(weights[row].double().numpy(), top_k=top_k[row], top_p=top_p[row], min_p=0.0).sum()
        # Sums that come within rounding of the border may differ by a token.
        assert abs(int((weights[row] >= found[row]).sum()) - int(expected)) <= 1
    assert torch.equal(found, floors_by_bisection(weights, floor, filters))


@pytest.mark.parametrize("top_p", [0.0, 1e-12])
def test_a_tiny_top_p_keeps_the_likeliest_token(top_p: float) -> None:
    filters = Filters(None, None, column([top_p], torch.float64), None)
    logits = random_logits(1)
    for number in (0.0, 0.5, 1 - 2**-53):
        token_ids = sample(logits, SamplingTensors(random=randomness([number], filters=filters))).token_ids
        assert token_ids.tolist() == logits.argmax(-1).tolist()


def test_only_the_rows_that_ask_are_filtered() -> None:
    logits = random_logits(3)
    only = Filters(torch.tensor([1]), column([1], torch.int64), None, None)
    filtered = sample(logits, SamplingTensors(random=randomness([0.9] * 3, filters=only))).token_ids.tolist()
    free = sample(logits, SamplingTensors(random=randomness([0.9] * 3))).token_ids.tolist()
    assert filtered == [free[0], int(logits[1].argmax()), free[2]]


# --- drawing ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    vocab=st.integers(1, 700),
    number=st.floats(0, 1, exclude_max=True),
    temperature=st.floats(0.05, 3.0),
)
def test_a_draw_inverts_the_running_sum(seed: int, vocab: int, number: float, temperature: float) -> None:
    logits = random_logits(1, vocab=vocab, seed=seed)
    token = int(sample(logits, SamplingTensors(random=randomness([number], temperature=temperature))).token_ids)
    scores = logits[0].double().numpy() / temperature
    sums = np.cumsum(np.exp(scores - scores.max()))
    below = sums[token - 1] / sums[-1] if token else 0.0
    assert below - 1e-6 <= number <= sums[token] / sums[-1] + 1e-6


@pytest.mark.parametrize("number", [0.0, 0.25, 0.5, 0.75, 1 - 2**-53])
def test_a_token_that_weighs_nothing_is_never_drawn(number: float) -> None:
    for possible in ([0], [150], [299], [127, 128], [0, 299]):
        logits = torch.full((1, VOCAB), -torch.inf)
        logits[0, possible] = 1.0
        assert int(sample(logits, SamplingTensors(random=randomness([number]))).token_ids) in possible


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -3.0, 0.0])
    draws = 20_000
    numbers = (np.arange(draws) * 0.6180339887498949) % 1.0
    token_ids = sample(logits.expand(draws, -1), SamplingTensors(random=randomness(numbers, temperature=0.8))).token_ids
    expected = torch.softmax(logits / 0.8, -1) * draws
    found = torch.bincount(token_ids, minlength=8)
    # Evenly spread numbers do better than random ones: far within the 1 % bound of chi-square with 7 degrees, 18.5.
    assert float(((found - expected) ** 2 / expected).sum()) < 1.0


# --- log probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_raw_logits() -> None:
    logits = random_logits(4)
    tensors = SamplingTensors(bias=entries([(2, 11, 1000.0)]), logprobs=LogprobRows(torch.tensor([0, 2]), 3))
    sampled = sample(logits, tensors)
    reference = torch.log_softmax(logits.double(), -1)
    found = sampled.logprobs
    assert found is not None
    assert int(sampled.token_ids[2]) == 11
    for place, row in enumerate((0, 2)):
        token = int(sampled.token_ids[row])
        assert float(found.logprobs[place]) == pytest.approx(float(reference[row, token]), abs=1e-5)
        assert int(found.ranks[place]) == 1 + int((logits[row] > logits[row, token]).sum())
        values, ids = reference[row].topk(3)
        assert found.top_ids[place].tolist() == ids.tolist()
        assert found.top_logprobs[place].tolist() == pytest.approx(values.tolist(), abs=1e-5)


def test_equal_log_probabilities_are_listed_from_the_lowest_id() -> None:
    logits = torch.zeros(1, VOCAB, dtype=torch.bfloat16)
    logits[0, [280, 40, 170]] = 4.0
    found = token_logprobs(logits, torch.tensor([280]), 2)
    assert found.top_ids.tolist() == [[40, 170]]
    assert found.ranks.tolist() == [1]


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_as_many_top_tokens_come_as_were_asked_for(num_top: int) -> None:
    found = token_logprobs(random_logits(2), torch.tensor([1, 2]), num_top)
    assert found.top_ids.shape == found.top_logprobs.shape == (2, num_top)
    assert token_logprobs(random_logits(2, vocab=5), torch.tensor([1, 2]), 5).top_ids.shape == (2, 5)
