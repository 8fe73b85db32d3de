"""Agreement with a declared architecture: foreign weights mapped onto the reference, and the same numbers required.

`settled(subject)` of settling.py is the door; the checks are in check_spec.py.
"""
