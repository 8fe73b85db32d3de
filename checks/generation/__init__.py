"""What a decoding loop is held to: the forms it comes in, a model whose right answer is known, and its odds."""
