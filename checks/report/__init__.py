"""Verdicts to text and to JSON lines: pure functions of plain data, without torch."""
