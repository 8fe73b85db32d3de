"""The right answer of a decoding loop: how to call one, a model whose right answer is known, and χ² tests."""
