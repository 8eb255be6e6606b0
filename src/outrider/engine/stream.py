"""A completion as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from outrider.engine.completion import Completion
from outrider.engine.generation import Generation
from outrider.engine.outputs import Piece, RequestOutput


class Stream(Iterator[Piece]):
    """A prompt's completions, token by token. `output` grows with it, and holds the acceptance once it has ended.

    Closing it, or letting it go, aborts what is not finished. Where something went wrong with one
    completion alone, its error is raised after the pieces that came before it.
    """

    def __init__(
        self,
        generation: Generation,
        step: Callable[[Generation], None],  # waits for the next tokens of anybody, unless some have come for it
        release: Callable[[Sequence[Completion]], None],  # aborts completions; must be safe in a finalizer
    ) -> None:
        """`LLM.stream` makes it."""
        (self._output,) = generation.outputs
        self._generation = generation
        self._step, self._release = step, release

    @property
    def output(self) -> RequestOutput:
        """What has come so far."""
        for completion in self._generation.completions:
            completion.write_text()
        return self._output

    def __next__(self) -> Piece:
        pieces = self._generation.inbox.pieces
        while True:
            finished = self._output.finished  # looked at first: another thread may be adding the last pieces
            try:
                piece = pieces.popleft()
            except IndexError:  # none, or threads share the stream and another was first
                pass
            else:
                self._generation.completions[piece.index].write_text()
                return piece
            for completion in self._generation.ended():
                if completion.error is not None:
                    raise completion.error
            if finished:
                raise StopIteration
            if not self._output.finished:
                self._step(self._generation)

    def close(self) -> None:
        """Aborts what is not finished; pieces that came before can still be taken. Idempotent."""
        self._release(self._generation.completions)

    def __del__(self) -> None:
        self.close()
