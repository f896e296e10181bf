"""The tokens of a case: which ones the tokenizer kept, where they lie, and pictures of them."""
