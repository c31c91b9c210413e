"""An EAGLE-3 head on ONNX Runtime: its graph, its KV caches, and the step that guesses the next token of some rows.

Enters: tokens, the decoder's states or the head's own beside them. Leaves: logits over the head's own tokens, and the
states with which it goes on. Its caches are those of a decoder.

Shapes: L·H width of the decoder's states, H' hidden size of the head, V' its tokens.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...spec.draft import DraftSpec
from ...spec.geometry import ModelSpec
from ..room import cache_bytes, check_fits
from .mapped_weights import MappedWeights
from .onnxruntime_decoder import HostCaches, bind_caches, cache_form
from .onnxruntime_graph import open_graph
from .onnxruntime_package import ort

KEPT = 8
"""Tokens of a row at most whose step's memory is kept for the next one."""


class OnnxRuntimeDraft:
    """A lowered draft with its weights, ready to run.

    Args:
        graph: Serialized ONNX.
        weights: Initializers by name.
        folder: The model's or bundle's folder.
        spec: The head's geometry.
        model: The decoder's.
        session: Session configuration entries that the graph needs.
        threads: Threads of one operator; None takes the processors that this process may use.

    Raises:
        SessionError: ONNX Runtime does not accept the graph, or there are no threads.
    """

    def __init__(
        self,
        graph: bytes,
        weights: MappedWeights,
        folder: Path,
        spec: DraftSpec,
        model: ModelSpec,
        session: Mapping[str, str],
        threads: int | None = None,
    ) -> None:
        self.spec, self.model = spec, spec.as_model(model.max_positions)
        self.width = len(spec.states) * model.hidden_size
        self.weights = weights  # kept: the session reads the memory that these own
        self.session = open_graph(graph, weights, folder, session, threads, has_arena=False)

    def caches(self, batch: int, positions: int, *, sparse: bool = False) -> HostCaches:
        """Makes KV buffers for a batch, zeros at first, whose rows hold `positions` tokens each."""
        kind, elements, slot = cache_form(self.session, self.model)
        if not sparse:
            needed = cache_bytes(self.model, batch, positions, slot)
            what = f"the draft of a batch of {batch} rows of {positions} tokens"
            check_fits(
                what, needed, "start fewer rows, or of fewer tokens, or guess without the draft (draft_tokens=0)"
            )
        return HostCaches(self.model, batch, positions, kind, elements, sparse=sparse)

    def bind(self, caches: HostCaches, rows: slice) -> "OnnxRuntimeDraftBinding":
        """Binds some rows of the caches, for any number of steps."""
        return OnnxRuntimeDraftBinding(self, caches, rows)


class OnnxRuntimeDraftBinding:
    """A draft's graph bound to some rows of its caches."""

    def __init__(self, draft: OnnxRuntimeDraft, caches: HostCaches, rows: slice) -> None:
        self.draft, self.caches, self.rows = draft, caches, rows
        self.steps: dict[int, DraftStep] = {}

    def begin(
        self,
        ids_BS: NDArray[np.int64],
        past_B: NDArray[np.int32],
        last_B: NDArray[np.int64],
        states_BSW: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Reads tokens, each beside the decoder's state of the token before it.

        Args:
            ids_BS: Token ids, right-padded.
            past_B: Tokens in each row's cache before them.
            last_B: Each row's last token among them, behind which it guesses.
            states_BSW: The decoder's states [B, S, L·H].

        Returns:
            Logits [B, V'], and the head's own states [B, H']; until the next call of this.
        """
        step = self._step(ids_BS.shape[1])
        step.ids_BS[:], step.states_BSW[:], step.last_B1[:, 0] = ids_BS, states_BSW, last_B
        return step.run(past_B)

    def go_on(
        self, ids_B: NDArray[np.int64], past_B: NDArray[np.int32], hidden_BH: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Reads a guessed token of each row beside the state that it was guessed from.

        Returns:
            What `begin` returns, until the next call of this.
        """
        step = self._step(0)
        step.ids_BS[:, 0], step.hidden_BSH[:, 0] = ids_B, hidden_BH
        return step.run(past_B)

    def _step(self, length: int) -> "DraftStep":
        """A step over this number of tokens of each row, or with 0 over a guess; that of few tokens is made once."""
        found = self.steps.get(length)
        if found is None:
            found = DraftStep(self.draft, self.caches, self.rows, max(1, length))
            if length <= KEPT:
                self.steps[length] = found
        return found


class DraftStep:
    """A step over some tokens of each of some rows, whose memory is bound once: most steps are of few tokens.

    Either the decoder's states or the head's own are set; the others stay zeros.

    Args:
        draft: The draft.
        caches: Its caches.
        rows: The rows.
        length: Tokens of each row (S).
    """

    def __init__(self, draft: OnnxRuntimeDraft, caches: HostCaches, rows: slice, length: int) -> None:
        batch, spec = rows.stop - rows.start, draft.spec
        self.session, self.io = draft.session, draft.session.io_binding()
        self.ids_BS, self.past_B = np.zeros((batch, length), np.int64), np.zeros(batch, np.int32)
        self.last_B1 = np.zeros((batch, 1), np.int64)
        self.states_BSW = np.zeros((batch, length, draft.width), np.float32)
        self.hidden_BSH = np.zeros((batch, length, spec.hidden_size), np.float32)
        self.logits_B1V = np.zeros((batch, 1, spec.vocab_size), np.float32)
        self.next_B1H = np.zeros((batch, 1, spec.hidden_size), np.float32)
        inputs = {
            "input_ids": self.ids_BS,
            "past_lengths": self.past_B,
            "logit_positions": self.last_B1,
            "draft_states": self.states_BSW,
            "hidden": self.hidden_BSH,
        }
        self.kept = bind_caches(self.io, caches, rows)
        for name, array in inputs.items():
            self.kept.append((array, value := ort.OrtValue.ortvalue_from_numpy(array)))  # the same memory
            self.io.bind_ortvalue_input(name, value)
        for name, array in (("logits", self.logits_B1V), ("next_hidden", self.next_B1H)):
            self.kept.append((array, value := ort.OrtValue.ortvalue_from_numpy(array)))
            self.io.bind_ortvalue_output(name, value)

    def run(self, past_B: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Runs it behind the tokens that each row has read. Returns logits and the next states, in its own memory."""
        self.past_B[:] = past_B
        self.session.run_with_iobinding(self.io)
        return self.logits_B1V[:, 0], self.next_B1H[:, 0]
