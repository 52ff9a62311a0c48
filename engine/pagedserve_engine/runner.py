"""The only module that launches device work: one forward pass and the sampling of its rows.

``launch`` queues a step and the copies of its results to the host, and waits for nothing; ``PendingStep.read`` waits
for these copies alone. Between two steps the tokens stay on the device: ``last_tokens`` has each slot's latest, and
rows that a step in flight samples take theirs from there. Everything is queued in one stream, so a step finds what
those before it wrote, and may overwrite what they read. A launched step holds all that reading it takes, because its
slots may belong to others by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pagedserve_engine.attention.interface import AttentionBackend
from pagedserve_engine.batch import Batch, Int32Array
from pagedserve_engine.errors import PagedServeError
from pagedserve_engine.graphs import Choosing, DecodeGraphs, GraphKey, Recorder
from pagedserve_engine.inputs import InputBuilder, PromptRow, StepInputs
from pagedserve_engine.pending import NOT_A_NUMBER, PendingStep, SampledRows, classify, to_host
from pagedserve_engine.request import RequestState, SamplingParams
from pagedserve_engine.sampling import SamplingTensors, TokenLogprobs, sample, token_logprobs
from pagedserve_engine.sampling_plan import Draws
from pagedserve_engine.sampling_state import SamplingState

Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Token ids [S] int64 for logits [S, vocab] and ``Draws.numbers`` [6, S] float64, all on the device."""


class ModelRunner:
    """Runs batches through one model on one device."""

    def __init__(
        self,
        model: torch.nn.Module,
        inputs: InputBuilder,
        sampling: SamplingState,
        *,
        max_num_seqs: int,
        draw: Draw | None = None,
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._sampling = sampling
        self._prompt_lens = np.zeros(max_num_seqs, np.int32)
        """[max_num_seqs] prompt tokens of the request bound to each slot."""
        self._graphs: DecodeGraphs[CapturedStep] | None = None
        self.draw = draw
        """How tokens are drawn where nothing more is asked; None: as ``sampling`` does all else."""
        self._draws = torch.zeros(Draws.NUM_PARTS, max_num_seqs, dtype=torch.float64, device=self.device)
        """[6, max_num_seqs] what a captured step draws by."""
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=self.device)
        """[max_num_seqs + 1] the token that each slot sampled last; the last one is for rows that only pad."""

    @property
    def attention(self) -> AttentionBackend:
        """How steps attend over the cache."""
        return self._inputs.attention

    @property
    def device(self) -> torch.device:
        """Where steps run."""
        return self._inputs.device

    def launch(self, batch: Batch) -> PendingStep:
        """Queue one step. Raises OutOfDeviceMemoryError or DeviceFailedError where the device is at fault."""
        try:
            return self._launch(batch)
        except PagedServeError:
            raise
        except Exception as error:
            raise classify(error) from error

    def _launch(self, batch: Batch) -> PendingStep:
        failed = self._bind(batch)
        num_rows = self._captured_rows(batch)
        prompts: list[tuple[PromptRow, TokenLogprobs]] = []
        with torch.inference_mode():
            inputs = self._inputs.build(batch, num_rows=num_rows)
            if num_rows is not None:
                sampled: SampledRows | None = self._replay(batch, inputs, num_rows)
            else:
                logits = self._forward(inputs)
                sampled = self._sample(batch, inputs, logits) if inputs.num_sampled else None
                prompts = [(row, to_host(_score_prompt(row, logits))) for row in inputs.prompt_rows]
        pending = PendingStep(
            batch, self._sampling, sampled=sampled, prompts=prompts, failed=failed, replayed=num_rows is not None
        )
        return pending.mark(self.device)

    def _bind(self, batch: Batch) -> dict[int, Exception]:
        """Tell the sampler of the requests that came in; returns, by row, what is wrong with what they ask."""
        failed: dict[int, Exception] = {}
        for row in batch.admitted:
            slot, request = int(batch.slots[row]), batch.requests[row]
            self._prompt_lens[slot] = len(request.prompt_ids)
            try:
                self._sampling.bind(slot, request)
            except PagedServeError as error:
                failed[row] = error
        return failed

    def _forward(self, inputs: StepInputs) -> torch.Tensor:
        """Logits [K, vocab] of the wanted tokens."""
        if inputs.carries:
            inputs.carry_over(self.last_tokens)
        return self._call_model(inputs)

    def _call_model(self, inputs: StepInputs) -> torch.Tensor:
        output = self._model(
            input_ids=inputs.token_ids,
            position_ids=inputs.positions,
            use_cache=False,
            logits_to_keep=inputs.logit_tokens,
            paged=inputs.paged,
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _sample(self, batch: Batch, inputs: StepInputs, logits: torch.Tensor) -> SampledRows:
        """Choose the sampled rows' next tokens, keep them for the next step, and send them to the host."""
        slots = batch.slots[batch.sampled]
        positions = (batch.context_lens + batch.query_lens)[batch.sampled]
        draws = None if self.draw is None else self._sampling.draws(slots, positions)
        if draws is not None and not draws.greedy:
            return self._draw_rows(slots, inputs, logits, draws)
        tensors = self._sampling.prepare(slots, positions, positions - self._prompt_lens[slots])
        rows = len(slots)
        sampled = choose(logits[:rows], tensors, inputs.sampled_slots[:rows], last_tokens=self.last_tokens)
        self._sampling.record(slots, sampled.token_ids)
        return SampledRows(
            token_ids=sampled.marked.to("cpu", non_blocking=True),
            logprobs=None if sampled.logprobs is None else to_host(sampled.logprobs),
            reported=self._sampling.reported(slots),
        )

    def _draw_rows(self, slots: Int32Array, inputs: StepInputs, logits: torch.Tensor, draws: Draws) -> SampledRows:
        assert self.draw is not None
        rows = len(slots)
        token_ids = self.draw(logits[:rows], self._inputs.put(draws.numbers))
        marked = keep(logits[:rows], token_ids, inputs.sampled_slots[:rows], last_tokens=self.last_tokens)
        return SampledRows(marked.to("cpu", non_blocking=True), logprobs=None, reported=self._sampling.reported(slots))

    # --- captured steps ---------------------------------------------------------------------------------------------

    @property
    def graphs(self) -> DecodeGraphs[CapturedStep] | None:
        """The captured steps; None where every step is launched kernel by kernel."""
        return self._graphs

    def capture(
        self,
        recorder: Recorder,
        sizes: Sequence[int],
        *,
        each: Callable[[Iterable[GraphKey]], Iterable[GraphKey]] = iter,
    ) -> None:
        """Capture steps of so many decoding rows, before any request runs; leaves none where that can't be done.

        Without a ``draw`` of its own, only greedy rows are sampled inside. ``each`` may show progress.
        """
        graphs = DecodeGraphs(recorder, self._prepare)
        if graphs.capture(sizes, tuple(Choosing) if self.draw is not None else (Choosing.GREEDY,), each=each):
            self._graphs = graphs

    def release_graphs(self) -> None:
        """Forget the captured steps; every step is launched kernel by kernel again."""
        self._graphs = None

    def _prepare(self, key: GraphKey) -> Callable[[], CapturedStep]:
        """A step of rows that see nothing, where those to come will lie; running it is what is captured."""
        inputs = self._inputs.build(_empty_batch(1, 1, self._inputs), num_rows=key.num_rows)
        draws = self._draws[:, : key.num_rows]

        @torch.inference_mode()
        def run() -> CapturedStep:
            inputs.carry_over(self.last_tokens)
            logits = self._call_model(inputs)
            if key.choosing is Choosing.DRAWN and self.draw is not None:
                token_ids = self.draw(logits, draws)
            else:
                token_ids = logits.argmax(-1)
            marked = keep(logits, token_ids, inputs.sampled_slots, last_tokens=self.last_tokens)
            return CapturedStep(logits, token_ids, marked)

        return run

    def _captured_rows(self, batch: Batch) -> int | None:
        """How many rows the captured step for ``batch`` has; None where there is none."""
        if self._graphs is None or batch.num_decodes < len(batch.slots):
            return None
        return self._graphs.size_for(len(batch.slots))

    def _replay(self, batch: Batch, inputs: StepInputs, num_rows: int) -> SampledRows:
        """Replay the step, and sample once more outside where rows ask for what it doesn't do."""
        assert self._graphs is not None
        rows, positions = len(batch.slots), batch.context_lens + batch.query_lens
        draws = self._sampling.draws(batch.slots, positions)
        inside = draws is not None and (draws.greedy or self.draw is not None)
        choosing = Choosing.DRAWN if inside and draws is not None and not draws.greedy else Choosing.GREEDY
        if choosing is Choosing.DRAWN and draws is not None:
            self._draws[:, :rows].copy_(self._inputs.put(draws.numbers))
        step = self._graphs.replay(GraphKey(num_rows, choosing))
        if not inside:
            return self._sample(batch, inputs, step.logits)
        token_ids = step.marked[:rows].to("cpu", non_blocking=True)
        return SampledRows(token_ids, logprobs=None, reported=self._sampling.reported(batch.slots))

    def warm_up(self, num_tokens: int, num_seqs: int) -> float:
        """Run a step of ``num_tokens`` query tokens in up to ``num_seqs`` rows on the null block; returns seconds.

        It writes into the null block alone and samples nothing that anybody sees.
        """
        started = time.perf_counter()
        batch = _empty_batch(num_tokens, min(num_seqs, num_tokens), self._inputs)
        with torch.inference_mode():
            inputs = self._inputs.build(batch)
            self._forward(inputs).argmax(-1).cpu()
        return time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """What a captured step of S rows leaves behind, until the next one is replayed."""

    logits: torch.Tensor
    """[S, vocab]"""
    token_ids: torch.Tensor
    """[S] int64."""
    marked: torch.Tensor
    """[S] int32: the same, with NOT_A_NUMBER where the scores are NaN."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Tokens that were chosen, on the device."""

    token_ids: torch.Tensor
    """[S] int64."""
    marked: torch.Tensor
    """[S] int32: the same, with NOT_A_NUMBER where the scores are NaN."""
    logprobs: TokenLogprobs | None


def choose(logits: torch.Tensor, tensors: SamplingTensors, slots: torch.Tensor, *, last_tokens: torch.Tensor) -> Choice:
    """Sample each row of ``logits`` [S, vocab] and leave the tokens in ``last_tokens`` at ``slots`` [S] (int64)."""
    sampled = sample(logits, tensors)
    marked = keep(logits, sampled.token_ids, slots, last_tokens=last_tokens)
    return Choice(sampled.token_ids, marked, sampled.logprobs)


def keep(
    logits: torch.Tensor, token_ids: torch.Tensor, slots: torch.Tensor, *, last_tokens: torch.Tensor
) -> torch.Tensor:
    """Leave ``token_ids`` [S] in ``last_tokens`` at ``slots``; returns them [S] int32, marked where scores are NaN."""
    last_tokens.index_copy_(0, slots, token_ids)
    # A row of which any score is NaN has NaN for its likeliest token.
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return token_ids.masked_fill(chosen.isnan(), NOT_A_NUMBER).to(torch.int32)


def _score_prompt(row: PromptRow, logits: torch.Tensor) -> TokenLogprobs:
    own = logits[row.first_logit : row.first_logit + len(row.next_ids)]
    return token_logprobs(own, row.targets, row.num_top)


def _empty_batch(num_tokens: int, num_rows: int, inputs: InputBuilder) -> Batch:
    """Rows of one token, the last one taking the rest, all on the null block."""
    query_lens = np.ones(num_rows, np.int32)
    query_lens[-1] += num_tokens - num_rows
    columns = -(-int(query_lens[-1]) // inputs.block_size)
    request = RequestState.create("warm-up", [0], SamplingParams(max_tokens=1), arrival_time=0.0, max_model_len=2)
    return Batch(
        requests=[request] * num_rows,
        slots=np.arange(num_rows, dtype=np.int32),
        stays=np.zeros(num_rows, np.int32),
        query_lens=query_lens,
        context_lens=np.zeros(num_rows, np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        carried=np.zeros(num_rows, np.bool_),
        sampled=np.ones(num_rows, np.bool_),
        block_tables=tuple(np.zeros((num_rows, columns), np.int32) for _ in range(inputs.num_groups)),
        num_decodes=num_rows - (num_tokens > num_rows),
        admitted=(),
    )
