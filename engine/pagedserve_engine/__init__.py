"""The engine: a language model over the OpenAI API from a paged cache with continuous batching."""

from pagedserve_engine.config import prepare_process

# Before anything imports torch.
prepare_process()
