"""What mlx-lm's loop decodes several sequences with, made to say how large its caches are."""

import threading
import weakref

import mlx_lm.server
from mlx_lm.generate import BatchGenerator

this_thread = threading.local()  # `worker`: whose generation thread it is


class Batch(BatchGenerator):
    """mlx-lm's, which says what its caches take: `kv_bytes`, as of its last step."""

    kv_bytes = 0

    def __init__(self, model, **options):
        super().__init__(model, **options)
        worker = getattr(this_thread, "worker", None)
        if worker is not None:
            worker.batch = weakref.ref(self)

    def next(self, *args, **options):
        responses = super().next(*args, **options)
        self.kv_bytes = self.prompt_cache_nbytes
        return responses

    def remove(self, *args, **options):
        caches = super().remove(*args, **options)
        self.kv_bytes = self.prompt_cache_nbytes
        return caches


# mlx-lm's loop keeps its batch to itself, in a local variable.
mlx_lm.server.BatchGenerator = Batch
