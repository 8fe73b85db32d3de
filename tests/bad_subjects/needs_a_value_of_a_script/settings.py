"""Reads a file when it is imported."""

import json
from types import SimpleNamespace


def load(path):
    with open(path) as file:
        return json.load(file, object_hook=lambda read: SimpleNamespace(**read))


cfg = load("settings.json")
