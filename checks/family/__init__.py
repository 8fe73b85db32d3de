"""Agreement with a declared architecture: the reference with the model's own weights must give the model's numbers.

The entry point is `fit_to(subject, family)` in fit.py; the checks are in check_spec.py.
"""
