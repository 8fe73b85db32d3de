"""What a forward did, observed from outside: calls of modules, products, attention, dropout, casts, random draws."""
