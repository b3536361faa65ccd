"""Evaluation of a trained model: perplexity of texts, and the tasks of lm-evaluation-harness.

`scoring` asks a model for log-probabilities of tokens, `perplexity` for those of whole texts,
`requests` answers what the harness asks, without importing it; `harness` is the adapter that does.
"""

BATCH_TOKENS = 1 << 14
"""Tokens of a batch on each device, padding included."""
