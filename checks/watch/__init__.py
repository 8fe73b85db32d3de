"""What a forward did: calls of modules, products, softmax, dropout, casts and draws, seen from outside."""
