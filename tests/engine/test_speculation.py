"""Prompt lookup: what is drafted, and that drafts change how many tokens a step brings and never which."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models import load_reference, reference_logits, tiny_model
from pagedserve_engine.assembly import choose_steps_in_flight
from pagedserve_engine.batch import Batch, ReadyStep, StepOutput
from pagedserve_engine.config import EngineConfig
from pagedserve_engine.errors import OutOfDeviceMemoryError, StepFailedError
from pagedserve_engine.request import FinishReason, GrammarSpec
from pagedserve_engine.speculation import LONGEST, LOOKBACK, SHORTEST, NgramDrafter
from recorder import RepeatingRecorder, draw
from scheduling import Engine, prompt
from stepping import Exactness, SteppedEngine

# --- drafts -----------------------------------------------------------------------------------------------------------


def draft(known: Sequence[int], *, num_tokens: int = 4, most: int = 99) -> list[int]:
    return NgramDrafter(num_tokens).draft(np.array(known, np.int32), most=most).tolist()


def naive_draft(known: Sequence[int], num_tokens: int) -> list[int]:
    for length in range(min(LONGEST, len(known) - 1), SHORTEST - 1, -1):
        for start in range(len(known) - length - 1, -1, -1):
            if known[start : start + length] == known[-length:]:
                text = list(known)
                for place in range(start + length, start + length + num_tokens):
                    text.append(text[place])
                return text[len(known) :]
    return []


def test_what_followed_the_last_tokens_before_is_drafted() -> None:
    assert draft([1, 2, 3, 4, 5, 6, 9, 1, 2]) == [3, 4, 5, 6]


def test_the_longest_match_wins_over_a_later_one_and_among_equals_the_latest() -> None:
    assert draft([7, 1, 2, 10, 8, 1, 2, 20, 7, 1, 2])[0] == 10
    assert draft([1, 2, 10, 8, 1, 2, 20, 9, 1, 2])[0] == 20


def test_one_equal_token_is_not_enough() -> None:
    assert draft([1, 2, 3, 1]) == []
    assert draft([1]) == []
    assert draft([1, 2]) == []


def test_a_match_that_the_end_overlaps_goes_on_periodically() -> None:
    assert draft([5, 5, 5]) == [5, 5, 5, 5]
    assert draft([9, 1, 2, 3, 1, 2, 3, 1, 2], num_tokens=5) == [3, 1, 2, 3, 1]


def test_a_draft_is_no_longer_than_allowed() -> None:
    assert draft([1, 2, 3, 4, 5, 1, 2], most=2) == [3, 4]
    assert draft([1, 2, 3, 4, 5, 1, 2], num_tokens=1) == [3]


def test_the_search_is_bounded() -> None:
    filling = list(range(10, 10 + LOOKBACK))
    assert draft([1, 2, 3, *filling, 1, 2]) == []
    assert draft([1, 2, 3, *filling[:-5], 1, 2])[0] == 3


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(1, 8))
def test_drafts_are_those_of_a_plain_search(known: list[int], num_tokens: int) -> None:
    assert draft(known, num_tokens=num_tokens) == naive_draft(known, num_tokens)


# --- bookkeeping, on the shadow ---------------------------------------------------------------------------------------


def speculating(**options: Any) -> Engine:
    return Engine(**{"num_blocks": 64, "budget": 64, "drafted": 4, "period": 3, **options})


def drafted_rows(batch: Batch) -> int:
    return int((batch.depths > 0).sum())


@pytest.mark.parametrize("layout", [(("full",), None), (("sliding", "full"), 6), (("sliding",), 5)])
@pytest.mark.parametrize("block_size", [1, 4])
def test_accepted_drafts_save_steps_and_change_nothing(
    layout: tuple[tuple[str, ...], int | None], block_size: int
) -> None:
    engine = speculating(layer_types=layout[0], window=layout[1], block_size=block_size, num_blocks=400)
    ids = [engine.add(prompt(5, n), max_tokens=60) for n in range(3)]
    steps = engine.run()
    for request_id in ids:
        engine.assert_exact(request_id)
    assert 0 < engine.scheduler.num_accepted < engine.scheduler.num_drafted
    assert steps == len(engine.runner.batches) < 60
    assert engine.cache.num_free == engine.cache.num_total


def test_a_step_s_figures_tell_of_its_drafts() -> None:
    engine = speculating()
    engine.add(prompt(5), max_tokens=40)
    drafted = accepted = generated = 0
    while not engine.scheduler.idle:
        _, stats = engine.processor.step()
        assert stats.num_tokens == engine.runner.batches[-1].num_tokens
        drafted, accepted = drafted + stats.drafted_tokens, accepted + stats.accepted_tokens
        generated += stats.generated_tokens
    assert generated == 40
    assert drafted == sum(drafted_rows(batch) for batch in engine.runner.batches)
    # Every step brings the token that is due, and one for each accepted draft.
    assert accepted == 40 - len(engine.runner.batches)


def run_of_accepted(words: list[int], *, inside: Sequence[int]) -> tuple[list[int], int] | None:
    """The output behind ``words``, and where a new one of ``inside`` is neither first nor last of a step's tokens."""
    engine = speculating()
    request_id = engine.add(words, max_tokens=60)
    engine.run()
    tokens, place = engine.tokens(request_id), 0
    for output in engine.news[request_id]:
        for at in range(place + 1, place + len(output.token_ids) - 1):
            if tokens[at] in inside and tokens[at] not in tokens[:at]:
                return tokens, at
        place += len(output.token_ids)
    return None


def test_a_stop_token_inside_an_accepted_run_ends_the_request_there() -> None:
    # What is accepted came before, so it can end a request only where the prompt has it.
    words = next(words for n in range(50) if run_of_accepted(words := prompt(3, n) * 3, inside=words))
    tokens, place = run_of_accepted(words, inside=words) or ([], 0)
    for options, params in (
        ({}, {"stop_token_ids": (tokens[place],)}),
        ({"eos": (tokens[place],)}, {"ignore_eos": False}),
    ):
        engine = speculating(**options)
        request_id, other = engine.add(words, max_tokens=60, **params), engine.add(prompt(5), max_tokens=60)
        engine.run()
        last = engine.news[request_id][-1]
        assert engine.tokens(request_id) == tokens[: place + 1]
        assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, tokens[place])
        engine.assert_exact(other)
        assert engine.cache.num_free == engine.cache.num_total


def test_an_output_ends_at_its_length_inside_a_run() -> None:
    for max_tokens in range(1, 30):
        engine = speculating()
        request_id = engine.add(prompt(3) * 3, max_tokens=max_tokens)
        engine.run()
        engine.assert_exact(request_id)
        # The last token is never computed, so nothing beyond the one before it is worth a row.
        assert all(batch.context_lens.max() <= 9 + max_tokens - 2 for batch in engine.runner.batches)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [OutOfDeviceMemoryError("full"), ValueError("boom")])
def test_a_step_with_drafts_that_fails_is_computed_again_or_ends_its_requests(error: Exception, late: bool) -> None:
    engine = speculating(block_size=2, layer_types=("sliding", "full"), window=4, num_blocks=100)
    ids = [engine.add(prompt(3, n) * 3, max_tokens=40) for n in range(2)]
    engine.step()
    # Two rows are two tokens, unless there are drafts.
    engine.runner.smallest_failing_batch = 3
    errors = engine.runner.late_errors if late else engine.runner.errors
    errors.append(error)
    while errors:
        engine.step()
    assert drafted_rows(engine.runner.batches[-1]) > 0
    engine.scheduler.check()
    ids.append(engine.add(prompt(3) * 3, max_tokens=40))
    engine.run()
    for request_id in ids:
        if engine.reason(request_id) is FinishReason.LENGTH:
            engine.assert_exact(request_id)
    lost = [engine.reason(request_id) is FinishReason.ERROR for request_id in ids]
    assert lost == ([False] * 3 if isinstance(error, OutOfDeviceMemoryError) else [True, True, False])


def test_only_accepted_tokens_are_found_again() -> None:
    engine = speculating(block_size=2)
    first = engine.add(prompt(5), max_tokens=60)
    while engine.reason(first) is None:
        engine.step()
        known = [*prompt(5), *engine.tokens(first)]
        hashes: list[bytes] = []
        engine.cache.hash_blocks(known, hashes)
        # All that is computed, a token less than known, is sealed as far as it fills blocks.
        assert engine.cache.match([*hashes, b"?"], len(known) + 2) == (len(known) - 1) // 2 * 2
    assert engine.scheduler.num_accepted < engine.scheduler.num_drafted


def test_a_draft_is_at_most_twice_as_long_as_the_last_one_was_right() -> None:
    engine = speculating(drafted=8, max_num_seqs=64)
    request_id = engine.add(prompt(3) * 3, max_tokens=200)
    reach, lengths = 2, []
    while engine.reason(request_id) is None:
        before = len(engine.tokens(request_id))
        engine.step()
        length = drafted_rows(engine.runner.batches[-1])
        assert length <= reach
        if length:
            lengths.append(length)
            reach = max(1, 2 * (len(engine.tokens(request_id)) - before - 1))
    assert lengths[0] == 2
    assert {1, 2, 4, 8} <= set(lengths)
    engine.assert_exact(request_id)


def test_drafts_take_what_prompts_leave_of_the_budget() -> None:
    engine = speculating(budget=8)
    request_id = engine.add(prompt(5), max_tokens=60)
    while engine.scheduler.num_drafted < 8:
        engine.step()
    long = engine.add(prompt(40, 5), max_tokens=2)
    for _ in range(5):
        engine.step()
        batch = engine.runner.batches[-1]
        assert (batch.query_lens.tolist(), drafted_rows(batch)) == ([1, 7], 0)
    engine.run()
    engine.assert_exact(request_id)
    engine.assert_exact(long)
    assert max(batch.num_tokens for batch in engine.runner.batches) <= 8


def test_a_step_has_no_more_rows_with_drafts_than_without() -> None:
    engine = speculating(max_num_seqs=3)
    ids = [engine.add(prompt(5, n), max_tokens=40) for n in range(2)]
    engine.run()
    assert max(len(batch.requests) for batch in engine.runner.batches) == 3
    for request_id in ids:
        engine.assert_exact(request_id)


def test_drafts_shrink_where_blocks_are_short_and_nobody_gives_way_for_them() -> None:
    outcomes = []
    for drafted in (0, 4):
        engine = speculating(drafted=drafted, num_blocks=15, block_size=4, safety_margin=0.9)
        ids = [engine.add(prompt(5, n), max_tokens=22) for n in range(2)]
        engine.run()
        for request_id in ids:
            engine.assert_exact(request_id)
        outcomes.append(engine.scheduler.num_preemptions)
    assert outcomes == [0, 0]
    for batch in engine.runner.batches:
        # Below the margin a draft stays within blocks that its request has.
        ends = batch.context_lens[: batch.num_decodes] - batch.depths if len(batch.depths) else np.empty(0)
        assert (ends // 4 == batch.context_lens[: len(ends)] // 4).all()
    assert engine.scheduler.num_drafted > 0


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.1},
        {"frequency_penalty": 0.5},
        {"presence_penalty": -0.5},
        {"grammar": GrammarSpec("regex", "x")},
    ],
)
def test_what_depends_on_the_tokens_before_is_not_drafted(params: dict[str, Any]) -> None:
    engine = speculating()
    plain, followed = engine.add(prompt(5), max_tokens=40), engine.add(prompt(5, 9), max_tokens=40, **params)
    engine.run()
    drafted = {
        batch.requests[row].request_id
        for batch in engine.runner.batches
        for row in np.flatnonzero(batch.depths > 0).tolist()
    }
    assert drafted == {plain}
    engine.assert_exact(followed)


def test_tokens_in_flight_are_not_drafted_upon() -> None:
    engine = speculating(steps_in_flight=1)
    # Where a token is awaited the table has none: zero.
    request_id = engine.add([0] * 6, max_tokens=40)
    engine.run()
    engine.assert_exact(request_id)
    assert engine.scheduler.num_drafted == 0


def test_a_step_with_drafts_is_read_before_the_next_one_is_launched() -> None:
    alone = 0
    for n in range(8):
        engine = speculating(steps_in_flight=1)
        # A grammar has every step read, so that drafts may begin; they may go on without it.
        followed = engine.add(prompt(5, 9), max_tokens=4, grammar=GrammarSpec("regex", "x"))
        plain = engine.add(prompt(3, n) * 3, max_tokens=60)
        while engine.reason(plain) is None:
            engine.step()
            assert engine.scheduler.steps_in_flight == 0 or drafted_rows(engine.runner.batches[-1]) == 0
        engine.run()
        engine.assert_exact(plain)
        engine.assert_exact(followed)
        drafted = [batch for batch in engine.runner.batches if drafted_rows(batch)]
        alone += sum(engine.requests[followed] not in batch.requests for batch in drafted)
    assert alone > 0


def test_a_gpu_reads_each_step_before_the_next_where_drafts_need_its_tokens() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_steps_in_flight(EngineConfig(), gpu) == 1
    assert choose_steps_in_flight(EngineConfig(speculation="ngram"), gpu) == 0
    assert choose_steps_in_flight(EngineConfig(speculation="ngram"), cpu) == 0


class FailingRows:
    """Steps of which the rows at ``depth`` fail, as far as there are any."""

    def __init__(self, engine: Engine, depth: int) -> None:
        self._runner = engine.runner
        self._depth = depth
        self.failed: list[bool] = []
        """For each of them, whether it stood behind right drafts alone."""

    def launch(self, batch: Batch) -> ReadyStep:
        output = self._runner.launch(batch).read()
        rows = np.flatnonzero(batch.depths == self._depth).tolist()
        for row in rows:
            behind = slice(row - self._depth, row)
            right = output.token_ids[behind] == batch.token_ids[row - self._depth + 1 : row + 1]
            self.failed.append(bool(right.all()))
        errors: dict[int, Exception] = {row: StepFailedError("not numbers") for row in rows}
        return ReadyStep(StepOutput(output.token_ids, {}, {}, errors))


def test_a_row_that_fails_counts_only_where_its_drafts_were_right() -> None:
    engine = speculating(max_num_seqs=64, num_blocks=400)
    failing = engine.processor._runner = FailingRows(engine, depth=2)  # type: ignore[assignment]
    ids = [engine.add(prompt(5, n), max_tokens=60) for n in range(8)]
    engine.run()
    ended = [request_id for request_id in ids if engine.reason(request_id) is FinishReason.ERROR]
    assert failing.failed.count(True) == len(ended) > 0
    assert failing.failed.count(False) > 0
    for request_id in ids:
        tokens = engine.tokens(request_id)
        assert tokens == engine.expect(request_id)[: len(tokens)]
    assert engine.cache.num_free == engine.cache.num_total


# --- the whole engine -------------------------------------------------------------------------------------------------

_SMALL_VOCAB = {"vocab_size": 16}
"""So that even random words repeat themselves."""


def repetitive_prompts(count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    prompts = []
    for _ in range(count):
        phrase = [chance.randrange(3, 16) for _ in range(chance.randrange(2, 10))]
        prompts.append((phrase * 25)[: chance.randrange(10, 50)])
    return prompts


def answers(engine: SteppedEngine, prompts: list[list[int]], **params: Any) -> list[list[int]]:
    """Outputs, a dozen requests at a time: with more there would be no rows left for drafts."""
    ids = []
    for first in range(0, len(prompts), 12):
        for place, words in enumerate(prompts[first : first + 12]):
            seed = {"seed": first + place} if "temperature" in params else {}
            ids.append(engine.add(words, **params, **seed))
        engine.run()
    return [engine.tokens(request_id) for request_id in ids]


@pytest.mark.parametrize(("name", "count"), [("llama", 204), ("gemma3", 36)])
def test_greedy_output_is_the_same_with_and_without(name: str, count: int) -> None:
    _, folder = tiny_model(name, **_SMALL_VOCAB)
    prompts = repetitive_prompts(count, seed=1)
    found = []
    for speculation in ("none", "ngram"):
        engine = SteppedEngine(folder, speculation=speculation, max_num_seqs=64, num_blocks=256)
        found.append(answers(engine, prompts, max_tokens=12))
    assert engine.scheduler.num_accepted > count
    exactness = Exactness(load_reference(folder))
    for place, words in enumerate(prompts):
        if found[0][place] != found[1][place] or place % 24 == 0:
            exactness.check(words, found[1][place])
    assert exactness.num_excused <= 1


def test_seeded_draws_are_the_same_with_and_without() -> None:
    _, folder = tiny_model("llama", **_SMALL_VOCAB)
    prompts = repetitive_prompts(96, seed=2)
    found = []
    for speculation in ("none", "ngram"):
        engine = SteppedEngine(folder, speculation=speculation, max_num_seqs=64, num_blocks=256)
        found.append(
            answers(engine, prompts, max_tokens=16, temperature=0.8, top_p=0.95, top_k=12, min_p=0.01, min_tokens=9)
        )
    assert engine.scheduler.num_accepted > 60
    # A number may fall between two tokens by less than what a batch's shape rounds.
    assert sum(a != b for a, b in zip(*found, strict=True)) <= 1


@pytest.mark.parametrize("params", [{}, {"temperature": 0.8, "top_p": 0.95}], ids=["greedy", "drawn"])
def test_captured_steps_take_drafts_and_pad_them(params: dict[str, Any]) -> None:
    _, folder = tiny_model("llama", **_SMALL_VOCAB)
    prompts = repetitive_prompts(24, seed=6)
    found = []
    for speculation in ("none", "ngram"):
        engine = SteppedEngine(folder, speculation=speculation, max_num_seqs=64, num_blocks=256, attention="native")
        engine.core.runner.draw = draw
        recorder = RepeatingRecorder()
        engine.core.runner.capture(recorder, (8, 64))
        found.append(answers(engine, prompts, max_tokens=12, **params))
        assert recorder.num_replayed > 10
    assert engine.scheduler.num_accepted > 10
    assert sum(a != b for a, b in zip(*found, strict=True)) <= 1


def test_ends_and_minimum_lengths_are_kept_among_drafts() -> None:
    _, folder = tiny_model("llama", **_SMALL_VOCAB)
    prompts = repetitive_prompts(48, seed=3)
    found = []
    for speculation in ("none", "ngram"):
        engine = SteppedEngine(folder, speculation=speculation, max_num_seqs=64, num_blocks=256)
        found.append(answers(engine, prompts, max_tokens=24, stop_token_ids=(5, 7), min_tokens=6))
    assert sum(a != b for a, b in zip(*found, strict=True)) <= 1
    assert all(tokens[-1] in (5, 7) or len(tokens) == 24 for tokens in found[1])
    assert min(len(tokens) for tokens in found[1]) > 6
    assert len({len(tokens) for tokens in found[1]}) > 5


def test_log_probabilities_come_for_every_token_of_a_run() -> None:
    _, folder = tiny_model("llama", **_SMALL_VOCAB)
    reference = load_reference(folder)
    engine = SteppedEngine(folder, speculation="ngram", max_num_seqs=64, num_blocks=256)
    prompts = repetitive_prompts(6, seed=4)
    ids = [engine.add(words, max_tokens=20, logprobs=2) for words in prompts]
    engine.run()
    assert engine.scheduler.num_accepted > 0
    for words, request_id in zip(prompts, ids, strict=True):
        tokens = engine.tokens(request_id)
        entries = [entry for news in engine.news[request_id] for entry in news.logprobs or ()]
        assert [entry.token_id for entry in entries] == tokens
        scores = reference_logits(reference, [*words, *tokens])[len(words) - 1 : -1].float().log_softmax(-1)
        expected = scores.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor([entry.logprob for entry in entries]), expected, atol=1e-3, rtol=0)


def test_unseeded_draws_have_the_model_s_distribution() -> None:
    """Pairs of tokens behind one prompt, against the products of the reference's probabilities."""
    _, folder = tiny_model("llama", vocab_size=8, eos_token_id=7)
    chance = random.Random(5)
    words = [chance.randrange(8) for _ in range(80)]
    reference = load_reference(folder)
    exact = torch.zeros(8, 8, dtype=torch.float64)
    first = reference_logits(reference, words)[-1].double().softmax(-1)
    for token in range(8):
        exact[token] = first[token] * reference_logits(reference, [*words, token])[-1].double().softmax(-1)
    engine = SteppedEngine(folder, speculation="ngram", max_num_seqs=200, num_blocks=2048)
    pairs: Counter[tuple[int, ...]] = Counter()
    for _ in range(40):
        ids = [engine.add(words, max_tokens=3, temperature=1.0) for _ in range(50)]
        engine.run()
        pairs.update(tuple(engine.tokens(request_id)[:2]) for request_id in ids)
    # Nearly every second token was drafted, some rightly: a draft that was favoured, or slighted, would show.
    assert engine.scheduler.num_drafted > 1500
    assert engine.scheduler.num_accepted > 150
    for (one, other), probability in np.ndenumerate(exact.numpy()):
        deviation = (2000 * probability * (1 - probability)) ** 0.5
        assert abs(pairs[one, other] - 2000 * probability) < 6 * deviation + 3
