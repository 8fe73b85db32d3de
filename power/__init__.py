"""How much the checks catch: all known bugs and correct models (power), and mutants of a public file (mutants)."""
