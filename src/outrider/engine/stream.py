"""A completion as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from outrider.engine.completion import Inbox
from outrider.engine.outputs import Piece, RequestOutput


class Stream(Iterator[Piece]):
    """A prompt's completions, token by token. `output` grows with it, and holds the acceptance once it has ended.

    Closing it, or letting it go, aborts what is not finished. Where something went wrong with one
    completion alone, its error is raised after the pieces that came before it.
    """

    def __init__(
        self,
        output: RequestOutput,
        inbox: Inbox,
        request_ids: Iterable[str],
        advance: Callable[[], None],  # runs a step
        release: Callable[[Iterable[str]], None],  # aborts requests; must be safe in a finalizer
    ) -> None:
        """`LLM.stream` makes it."""
        self.output = output
        self._inbox = inbox
        self._request_ids = tuple(request_ids)
        self._advance, self._release = advance, release

    def __next__(self) -> Piece:
        inbox = self._inbox
        while not inbox.pieces:
            while inbox.ended:
                completion = inbox.ended.popleft()
                if completion.error is not None:
                    raise completion.error
            if self.output.finished:
                raise StopIteration
            self._advance()
        return inbox.pieces.popleft()

    def close(self) -> None:
        """Aborts what is not finished; pieces that came before can still be taken. Idempotent."""
        self._release(self._request_ids)

    def __del__(self) -> None:
        self.close()
