"""The engine: a language model over the OpenAI API from a paged cache with continuous batching."""
