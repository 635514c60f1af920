"""featdiff: what did post-training change inside a language model, and does it matter?"""

__version__ = "0.1.0"
