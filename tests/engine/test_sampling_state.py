from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byte_tokenizer import EOS, byte_tokenizer
from naive_sampling import drawn, kept, penalise
from pagedserve_engine.errors import InvalidParameterError, PagedServeError, StepFailedError
from pagedserve_engine.grammar import GrammarCompiler
from pagedserve_engine.request import GrammarSpec, RequestState, SamplingParams, TokenLogprob
from pagedserve_engine.sampling import sample
from pagedserve_engine.sampling_state import SamplingState, read_logprobs, uniform_numbers

VOCAB = 64
STOP, OTHER_STOP = 2, 3


def new_state(slots: int = 8, *, grammars: GrammarCompiler | None = None, vocab: int = VOCAB) -> SamplingState:
    return SamplingState(vocab, slots, eos_token_ids=[STOP], grammars=grammars)


def new_request(params: SamplingParams, prompt: Sequence[int] = (5, 6, 7), output: Sequence[int] = ()) -> RequestState:
    request = RequestState.create("r", prompt, params, arrival_time=0.0, max_model_len=10_000)
    request.output_ids.extend(output)
    return request


def logits_for(request: RequestState, *, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    """A model of sorts: logits [vocab] that hang on all that is known of the sequence."""
    seed = hash((*request.prompt_ids, *request.output_ids)) % 2**31
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def step(
    state: SamplingState, bound: dict[int, RequestState], *, vocab: int = VOCAB
) -> tuple[dict[int, int], dict[int, Exception]]:
    """One step over ``bound``, requests by slot; returns the tokens and what failed, by slot."""
    slots = np.array(list(bound), dtype=np.int32)
    requests = list(bound.values())
    positions = np.array([request.num_tokens for request in requests], dtype=np.int32)
    generated = np.array([len(request.output_ids) for request in requests], dtype=np.int32)
    logits = torch.stack([logits_for(request, vocab=vocab) for request in requests])
    sampled = sample(logits, state.prepare(slots, positions, generated)).token_ids
    state.record(slots, sampled)
    token_ids = sampled.numpy().astype(np.int32)
    failed = state.advance(slots, token_ids)
    for request, token_id in zip(requests, token_ids.tolist(), strict=True):
        request.output_ids.append(token_id)
    return dict(zip(slots.tolist(), token_ids.tolist(), strict=True)), {
        int(slots[row]): error for row, error in failed.items()
    }


def run_alone(params: SamplingParams, num_tokens: int, *, slot: int = 0) -> list[int]:
    state, request = new_state(), new_request(params)
    state.bind(slot, request)
    for _ in range(num_tokens):
        step(state, {slot: request})
    return request.output_ids


EVERYTHING = SamplingParams(
    temperature=0.9,
    top_p=0.9,
    top_k=20,
    min_p=0.01,
    repetition_penalty=1.3,
    frequency_penalty=0.4,
    presence_penalty=0.2,
    logit_bias={9: 2.0, 11: -1.0},
    min_tokens=5,
    seed=77,
)

parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    top_k=st.sampled_from([0, 1, 5, 1000]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.5]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    logit_bias=st.sampled_from([{}, {4: 3.0, 8: -100.0}]),
    min_tokens=st.sampled_from([0, 3]),
    seed=st.integers(-(2**63), 2**64),
)


# Derandomised: sums in float32 and float64 may fall on two sides of a number once in a hundred thousand draws.
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    params=parameters,
    output=st.lists(st.integers(0, VOCAB - 1), max_size=8),
    prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8),
)
def test_a_token_is_what_the_definition_says(params: SamplingParams, output: list[int], prompt: list[int]) -> None:
    state, request = new_state(), new_request(params, prompt, output)
    state.bind(1, request)
    scores = logits_for(request).double().numpy()
    if len(output) < params.min_tokens:
        scores[STOP] = -1e30
    scores = penalise(scores, params, prompt, output)
    token = step(state, {1: request})[0][1]
    if params.temperature == 0.0:
        assert scores[token] == pytest.approx(scores.max(), abs=1e-5)
        return
    weights = np.exp((scores - scores.max()) / params.temperature)
    keep = kept(weights, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p)
    seed = np.array([params.seed % 2**64 if params.seed is not None else 0], dtype=np.uint64)
    number = float(uniform_numbers(seed, np.array([len(prompt) + len(output)]))[0])
    assert token == drawn(np.where(keep, weights, 0.0), number)


# --- what shares the batch never matters -----------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(mates=st.lists(parameters, min_size=1, max_size=5), place=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_a_seed_gives_the_same_tokens_whatever_shares_the_batch(
    mates: list[SamplingParams], place: int, seed: int
) -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, frequency_penalty=0.3, seed=seed)
    alone = run_alone(params, 6)
    state, request = new_state(), new_request(params)
    bound = {slot: new_request(mate, prompt=(slot + 1,)) for slot, mate in enumerate(mates)}
    items = list(bound.items())
    items.insert(min(place, len(items)), (7, request))
    for slot, each in items:
        state.bind(slot, each)
    for _ in range(6):
        step(state, dict(items))
    assert request.output_ids == alone


def test_rows_may_change_places_from_step_to_step() -> None:
    alone = run_alone(EVERYTHING, 12)
    state, request, mate = new_state(), new_request(EVERYTHING), new_request(SamplingParams(seed=1))
    state.bind(4, request)
    state.bind(2, mate)
    for turn in range(12):
        step(state, {4: request, 2: mate} if turn % 3 else ({2: mate, 4: request} if turn % 2 else {4: request}))
    assert request.output_ids == alone


def test_after_preemption_a_request_goes_on_as_if_never_interrupted() -> None:
    whole = run_alone(EVERYTHING, 20)
    state, request = new_state(), new_request(EVERYTHING)
    state.bind(0, request)
    for _ in range(8):
        step(state, {0: request})
    state.unbind(0)
    # Somebody else has the slot, and leaves other counts behind.
    guest = new_request(SamplingParams(frequency_penalty=2.0, logit_bias={1: 50.0}, seed=5), prompt=(8, 9))
    state.bind(0, guest)
    step(state, {0: guest})
    state.bind(3, request)
    for _ in range(12):
        step(state, {0: guest, 3: request})
    assert request.output_ids == whole


def test_seeds_and_positions_give_independent_even_numbers() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 100)
    positions = np.tile(np.arange(100), 200)
    numbers = uniform_numbers(seeds, positions).reshape(200, 100)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(np.unique(numbers)) == numbers.size
    # 100 cells of 200 draws each: chi-square with 99 degrees stays below 149 in 99.9 % of all cases.
    cells = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((cells - 200.0) ** 2 / 200.0).sum() < 149
    # Neighbours, in seed and in position, have nothing to do with one another (3.5 standard errors of 20,000 pairs).
    for first, second in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.025


def test_tokens_of_many_seeds_follow_the_distribution() -> None:
    count = 4_000
    state = SamplingState(10, count, eos_token_ids=[])
    requests = [new_request(SamplingParams(seed=seed), prompt=(1,)) for seed in range(count)]
    for slot, request in enumerate(requests):
        state.bind(slot, request)
    slots = np.arange(count, dtype=np.int32)
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 1.5, -2.0, 0.0, 0.3, 0.7])
    tensors = state.prepare(slots, np.ones(count, np.int32), np.zeros(count, np.int32))
    found = torch.bincount(sample(logits.expand(count, -1), tensors).token_ids, minlength=10)
    expected = torch.softmax(logits, -1) * count
    # Chi-square with 9 degrees stays below 27.9 in 99.9 % of all cases.
    assert float(((found - expected) ** 2 / expected).sum()) < 27.9


# --- cheap where nothing is asked for --------------------------------------------------------------------------------


def test_plain_greedy_rows_get_the_same_empty_tensors_every_step() -> None:
    state = new_state()
    slots, ones = np.arange(3, dtype=np.int32), np.ones(3, np.int32)
    for slot in range(3):
        state.bind(slot, new_request(SamplingParams(temperature=0.0)))
    first = state.prepare(slots, ones, ones)
    assert (first.allowed, first.bans, first.bias, first.penalties, first.random, first.logprobs) == (None,) * 6
    assert state.prepare(slots, ones + 1, ones + 1) is first


def test_only_the_random_numbers_are_new_while_the_batch_stays() -> None:
    state = new_state()
    state.bind(0, new_request(SamplingParams(temperature=1.0, top_p=0.9, presence_penalty=0.1)))
    slots, one = np.zeros(1, np.int32), np.ones(1, np.int32)
    first, second = state.prepare(slots, one, one), state.prepare(slots, one + 1, one + 1)
    assert first.random is not None
    assert second.random is not None
    assert first.random.filters is second.random.filters
    assert first.penalties is second.penalties
    assert not torch.equal(first.random.uniform, second.random.uniform)


def test_counts_are_kept_only_for_requests_with_penalties_and_lent_again() -> None:
    state = new_state(64)
    for slot in range(64):
        state.bind(slot, new_request(SamplingParams(temperature=0.0)))
    assert len(state._counts.tensor) == 0
    for _ in range(5):
        for slot in range(20):
            state.bind(slot, new_request(SamplingParams(presence_penalty=0.5)))
        for slot in range(20):
            state.unbind(slot)
    assert len(state._counts.tensor) == 32


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ignore_eos", "banned"),
    [(False, {STOP, OTHER_STOP}), (True, {OTHER_STOP})],
    ids=["every end", "an end that is ignored may come"],
)
def test_ends_are_banned_below_min_tokens(ignore_eos: bool, banned: set[int]) -> None:
    state = new_state()
    params = SamplingParams(
        temperature=0.0, min_tokens=3, stop_token_ids=(OTHER_STOP, VOCAB + 5), ignore_eos=ignore_eos
    )
    request = new_request(params)
    state.bind(0, request)
    logits = torch.zeros(1, VOCAB)
    logits[0, [STOP, OTHER_STOP]] = torch.tensor([9.0, 8.0])
    slots, position = np.zeros(1, np.int32), np.array([3], np.int32)
    for generated in range(5):
        tensors = state.prepare(slots, position + generated, np.array([generated], np.int32))
        token = int(sample(logits, tensors).token_ids)
        likeliest = STOP if generated >= 3 or STOP not in banned else 0
        assert token == likeliest


# --- log probabilities -----------------------------------------------------------------------------------------------


def test_log_probabilities_come_for_the_rows_that_asked_each_with_its_own_number() -> None:
    state = new_state()
    bound = {
        0: new_request(SamplingParams(temperature=0.0)),
        1: new_request(SamplingParams(temperature=0.0, logprobs=0)),
        2: new_request(SamplingParams(temperature=0.0, logprobs=4)),
    }
    for slot, request in bound.items():
        state.bind(slot, request)
    slots, threes = np.arange(3, dtype=np.int32), np.full(3, 3, np.int32)
    logits = torch.stack([logits_for(request) for request in bound.values()])
    sampled = sample(logits, state.prepare(slots, threes, threes))
    assert sampled.logprobs is not None
    token_ids, reported = sampled.token_ids.numpy(), state.reported(slots)
    entries = read_logprobs(token_ids[reported.rows], sampled.logprobs, reported.num_top)
    found = dict(zip(reported.rows.tolist(), entries, strict=True))
    assert set(found) == {1, 2}
    assert found[1].top == ()
    assert len(found[2].top) == 4
    assert found[2].top[0] == (found[2].token_id, found[2].logprob)
    assert all(isinstance(entry, TokenLogprob) and entry.rank == 1 for entry in found.values())


# --- what can go wrong with one request ------------------------------------------------------------------------------


def test_a_biased_token_outside_the_vocabulary_is_refused_by_name() -> None:
    state = new_state()
    with pytest.raises(InvalidParameterError, match="0 to 63") as caught:
        state.bind(0, new_request(SamplingParams(logit_bias={VOCAB: 1.0})))
    assert caught.value.param == "logit_bias"


def test_a_grammar_without_a_compiler_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="structured output"):
        new_state().bind(0, new_request(SamplingParams(grammar=GrammarSpec("json_object", ""))))


def test_a_refused_request_can_still_be_sampled() -> None:
    state, request = new_state(), new_request(SamplingParams(temperature=0.0, logit_bias={-1: 1.0}))
    with pytest.raises(PagedServeError):
        state.bind(0, request)
    assert step(state, {0: request})[1] == {}


def grammar_state() -> tuple[SamplingState, int]:
    tokenizer = byte_tokenizer()
    vocab = len(tokenizer) + 13
    return new_state(grammars=GrammarCompiler(tokenizer, vocab, [EOS]), vocab=vocab), vocab


def test_rows_with_a_grammar_follow_it_beside_rows_without() -> None:
    state, vocab = grammar_state()
    grammar = GrammarSpec("regex", "[0-9]{3}-[a-c]+x")
    bound = {
        0: new_request(SamplingParams(seed=1)),
        1: new_request(SamplingParams(seed=2, grammar=grammar)),
        2: new_request(SamplingParams(temperature=0.0)),
        3: new_request(SamplingParams(seed=3, grammar=grammar), prompt=(9,)),
    }
    for slot, request in bound.items():
        state.bind(slot, request)
    tokenizer = byte_tokenizer()
    for _ in range(5):
        assert step(state, bound, vocab=vocab)[1] == {}
    for slot in (1, 3):
        text = tokenizer.decode(bound[slot].output_ids)
        assert text[:3].isdigit()
        assert text[3] == "-"
    assert not tokenizer.decode(bound[0].output_ids)[:3].isdigit()


def test_a_grammar_goes_on_after_preemption_where_it_was() -> None:
    params = SamplingParams(seed=11, grammar=GrammarSpec("regex", "([a-f]{2}[0-9]{3}-)+"))
    outputs = []
    for interrupted in (False, True):
        state, vocab = grammar_state()
        request = new_request(params)
        state.bind(0, request)
        for turn in range(14):
            if interrupted and turn % 4 == 3:
                state.unbind(0)
                state.bind(0, request)
            assert step(state, {0: request}, vocab=vocab)[1] == {}
        outputs.append(request.output_ids)
    assert outputs[0] == outputs[1]


def test_a_token_that_breaks_its_grammar_fails_its_row_alone() -> None:
    state, vocab = grammar_state()
    digits = SamplingParams(temperature=0.0, grammar=GrammarSpec("regex", "[0-9]{8}"))
    bound = {slot: new_request(digits) for slot in range(2)}
    for slot, request in bound.items():
        state.bind(slot, request)
    slots, threes = np.arange(2, dtype=np.int32), np.full(2, 3, np.int32)
    token_ids = sample(torch.zeros(2, vocab), state.prepare(slots, threes, threes - 3)).token_ids.numpy()
    broken = token_ids.astype(np.int32)
    broken[1] = byte_tokenizer().encode("x")[0]
    failed = state.advance(slots, broken)
    assert list(failed) == [1]
    assert isinstance(failed[1], StepFailedError)
    # It stays failed, and its neighbour goes on.
    again = sample(torch.zeros(2, vocab), state.prepare(slots, threes, threes)).token_ids.numpy().astype(np.int32)
    assert list(state.advance(slots, again)) == [1]
