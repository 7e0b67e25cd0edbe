"""Depth policies, one file each. `create` is the only place that maps a method's name to its policy."""

from __future__ import annotations

from typing import Any

from buddy.errors import unknown
from buddy.policies.buddy import BuddyPolicy
from buddy.policies.first import FirstPolicy
from buddy.policies.pudding import PuddingPolicy
from buddy.policies.static import StaticPolicy
from buddy.routing.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    "buddy": BuddyPolicy,
    "first": FirstPolicy,
    "pudding": PuddingPolicy,
    "static": StaticPolicy,
}


def create(name: str, **settings: Any) -> Policy:
    """Build the policy of that name from the settings saved with a run.

    Raises:
        UserError: no policy has that name.
    """
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    return POLICIES[name](**settings)
