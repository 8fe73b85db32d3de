"""What a subject that agrees has of its own: nothing is wrong, and published weights would not fit as they are."""

from __future__ import annotations

from ..reference import norms_of
from ..specimen import Settled
from ..weights.planning import called
from ..weights.roles import Plan
from ..weights.table import SPELLED

NAMES = {"q": "queries", "k": "keys", "v": "values"}


def remarks(found: Settled) -> list[str]:
    """One sentence each."""
    plan = found.plan
    assert plan is not None
    said = [*_order(plan, found.family), *_stored(plan)]
    return said + (_unlike_gpt2(plan) if found.family == "gpt2" else [])


def _order(plan: Plan, family: str) -> list[str]:
    """Queries, keys and values elsewhere than where their names, or the published weights, have them."""
    layer = plan.inventory.layers[0]
    letters, _, layout = plan.arrangement.partition("|")
    if plan.form == "fused" and family == "gpt2" and (letters, layout) != ("qkv", "3hd"):
        order = ", ".join(NAMES[letter] for letter in letters)
        way = "" if layout == "3hd" else " head by head" if layout.startswith("h") else f" interleaved ({layout})"
        return [f"{layer[plan.attention[0].at].name} holds {order}{way}; GPT-2's published weights hold queries, keys, "
                "values: they would load and give other numbers"]  # fmt: skip
    if plan.form != "split":
        return []
    said = []
    for letter, matrix in zip(letters, plan.attention, strict=True):
        name = layer[matrix.at].name
        meant = [role for role in "qkv" if called(name, role)]
        if len(meant) == 1 and meant != [letter]:
            said.append(f"{name} makes the {NAMES[letter]}, and is called as a {SPELLED[meant[0]]}'s matrix")
    return said


def _stored(plan: Plan) -> list[str]:
    gains = [name for name, norm in norms_of(plan).items() if norm is not None and norm.minus_one]
    return [f"gains are stored minus one ({', '.join(gains)})"] if gains else []


def _unlike_gpt2(plan: Plan) -> list[str]:
    parts = {
        "attention's queries, keys and values": [m.bias for m in plan.attention],
        "attention's output": [plan.output.bias],
        "the feed-forward": [*(m.bias for m in plan.feed_forward), plan.feed_forward_output.bias],
        "the norms": [norm.bias for norm in norms_of(plan).values() if norm is not None],
    }
    bare = [part for part, biases in parts.items() if None in biases]
    said = [f"no biases, which GPT-2 has, in {', '.join(bare)}"] if bare else []
    if plan.positions is not None and not (plan.positions.trained and plan.positions.tensor.requires_grad):
        said.append(f"positions are a fixed table ({plan.positions.name}); GPT-2 learns its own")
    return said
