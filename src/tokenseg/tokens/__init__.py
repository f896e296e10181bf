"""What the tokenizer did with a case: which tokens it kept, where they lie, and pictures of them."""
