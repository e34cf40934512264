"""Between a handler and the generation thread: the answer there, word back that nobody waits."""

from queue import Queue

from mlx_lm.server import GenerationContext, TimeBudget

from .errors import Disconnected


class Steps(TimeBudget):
    """For how long mlx-lm's batched loop goes on without looking around: until a sequence of the batch has to leave,
    half a second at most.
    """

    over = False

    def __iter__(self) -> "Steps":
        self.over = False
        return super().__iter__()

    def __next__(self) -> None:
        if self.over:
            raise StopIteration
        return super().__next__()


class Reply(Queue):
    """What the generation thread answers one request with. Once cancelled it makes that thread stop."""

    def __init__(self, steps: Steps):
        super().__init__()
        self.steps = steps
        self.cancelled = False
        self.raises = False  # may the thread's own loop see an exception from `put`?
        self.context: GenerationContext | None = None

    def put(self, item, *args) -> None:
        if isinstance(item, GenerationContext):
            self.context = item
        if self.cancelled:
            self._stop_context()
            self.steps.over = True  # the loop sees the context right after this, and acts after its last step
            if self.raises and isinstance(item, tuple):
                raise Disconnected
        super().put(item, *args)

    def cancel(self) -> None:
        self.cancelled = True
        self._stop_context()

    def _stop_context(self) -> None:
        if self.context is not None:
            self.context.stop()
