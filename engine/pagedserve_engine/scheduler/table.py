"""The running requests as arrays, a row ("slot") each, so that a step's bookkeeping is vectorised.

Owned by the scheduler. Arrays are int32 or bool, [max_num_seqs].

Counts speak of what was launched: ``computed`` and ``known`` move when a step is scheduled. Of the known tokens the
last ``unread`` have no value on the host yet; ``read`` fills them in, the oldest first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from pagedserve_engine.request import RequestState
from pagedserve_engine.speculation import FIRST_REACH

SlotArray = npt.NDArray[np.int32]


class SequenceTable:
    """Slots, and what the scheduler must know of each at every step."""

    def __init__(self, max_num_seqs: int, *, max_model_len: int, eos_token_ids: Sequence[int]) -> None:
        self.max_num_seqs = max_num_seqs
        self.requests: list[RequestState | None] = [None] * max_num_seqs
        self.tokens = np.zeros((max_num_seqs, max_model_len), np.int32)
        """[max_num_seqs, max_model_len] known tokens; the pages of rows that were never long are never touched."""
        self.computed = np.zeros(max_num_seqs, np.int32)
        """Tokens whose keys and values are in the cache once all that is in flight has run."""
        self.known = np.zeros(max_num_seqs, np.int32)
        """Tokens of prompt and output, those in flight included."""
        self.unread = np.zeros(max_num_seqs, np.int32)
        """Known tokens at the end that steps in flight sample."""
        self.last_token = np.zeros(max_num_seqs, np.int32)
        """The last known token; of no meaning while it is unread."""
        self.limit = np.zeros(max_num_seqs, np.int32)
        """Known tokens at which a request has its full length."""
        self.stays = np.zeros(max_num_seqs, np.int32)
        """Goes up by one whenever a slot is left, so that a slot and its stay name one residence of one request."""
        self.read_first = np.zeros(max_num_seqs, np.bool_)
        """Requests whose next token can't be chosen before the host knows the one before."""
        self.draftable = np.zeros(max_num_seqs, np.bool_)
        """Requests of which a position may be sampled before the one before it is read: no penalties, no grammar."""
        self.reach = np.zeros(max_num_seqs, np.int32)
        """Tokens that the next draft may have at most: twice those that the last one had right, and at least one."""
        self._arrival = np.zeros(max_num_seqs, np.float64)
        self._ends_at_eos = np.zeros(max_num_seqs, np.bool_)
        self._has_stop_ids = np.zeros(max_num_seqs, np.bool_)
        self._eos = np.unique(np.array(list(eos_token_ids), np.int32))
        self._free = list(range(max_num_seqs - 1, -1, -1))
        self._running: SlotArray = np.empty(0, np.int32)

    @property
    def running(self) -> SlotArray:
        """Slots in use, the oldest arrival first."""
        return self._running

    @property
    def full(self) -> bool:
        """Whether every slot is taken."""
        return not self._free

    def enter(self, request: RequestState, *, computed: int) -> int:
        """Give ``request`` a slot, with ``computed`` tokens found in the cache; returns the slot."""
        slot = self._free.pop()
        tokens = self.tokens[slot, : request.num_tokens]
        tokens[: len(request.prompt_ids)] = request.prompt_ids
        tokens[len(request.prompt_ids) :] = request.output_ids
        params = request.params
        request.slot = slot
        self.requests[slot] = request
        self.computed[slot] = computed
        self.known[slot] = len(tokens)
        self.unread[slot] = 0
        self.last_token[slot] = tokens[-1]
        self.limit[slot] = len(request.prompt_ids) + request.max_tokens
        self.read_first[slot] = params.grammar is not None
        self.draftable[slot] = params.grammar is None and not params.penalised
        self.reach[slot] = FIRST_REACH
        self._arrival[slot] = request.arrival_time
        self._ends_at_eos[slot] = not params.ignore_eos
        self._has_stop_ids[slot] = bool(params.stop_token_ids)
        place = int(np.searchsorted(self._arrival[self._running], request.arrival_time, side="right"))
        self._running = np.insert(self._running, place, np.int32(slot))
        return slot

    def leave(self, slot: int) -> None:
        """Give the slot back."""
        self.request(slot).slot = -1
        self.requests[slot] = None
        self.stays[slot] += 1
        self._free.append(slot)
        self._running = self._running[self._running != slot]

    def request(self, slot: int) -> RequestState:
        """The request in a slot that is in use."""
        request = self.requests[slot]
        assert request is not None, f"slot {slot} is free"
        return request

    def requests_in(self, slots: list[int]) -> list[RequestState]:
        """The requests in ``slots``, which are in use."""
        found = [self.requests[slot] for slot in slots]
        assert None not in found, "a slot is free"
        return cast(list[RequestState], found)

    def __iter__(self) -> Iterator[RequestState]:
        return (self.request(slot) for slot in self._running.tolist())

    def outstanding(self, slots: SlotArray) -> npt.NDArray[np.int32]:
        """Known tokens of each slot that are not computed yet."""
        return self.known[slots] - self.computed[slots]

    def launch(self, slots: SlotArray, query_lens: SlotArray, sampled: npt.NDArray[np.bool_]) -> None:
        """Count ``query_lens`` tokens of each slot as computed, and one more as known where it is ``sampled``.

        A slot that stands there again, for drafts, counts once: what they bring is not known before they are read.
        """
        self.computed[slots] += query_lens
        self.known[slots] += sampled
        self.unread[slots] += sampled

    def read(self, slots: SlotArray, token_ids: SlotArray) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Fill in the oldest unread token of each slot; returns which stop at it, and which are at full length."""
        places = self.known[slots] - self.unread[slots]
        self.tokens[slots, places] = token_ids
        self.unread[slots] -= 1
        self.last_token[slots] = token_ids
        stops = (token_ids[:, None] == self._eos).any(1) & self._ends_at_eos[slots]
        for at in np.flatnonzero(self._has_stop_ids[slots]).tolist():
            if int(token_ids[at]) in self.request(int(slots[at])).params.stop_token_ids:
                stops[at] = True
        return stops, places + 1 >= self.limit[slots]

    def stops_at(self, request: RequestState, token_id: int) -> bool:
        """Whether ``token_id`` ends ``request``, which has no slot."""
        params = request.params
        return token_id in params.stop_token_ids or (not params.ignore_eos and token_id in self._eos)
