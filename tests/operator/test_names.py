from __future__ import annotations

from pagedserve_operator import names
from pagedserve_operator.names import Key, Owner

OWNER = Owner(Key("models", "chat"), "uid-1")


def test_the_selector_is_two_labels_for_ever() -> None:
    # A Deployment's selector is immutable: another label here would wedge every upgrade.
    assert names.selector_labels("chat") == {
        "app.kubernetes.io/name": "pagedserve-engine",
        "app.kubernetes.io/instance": "chat",
    }


def test_children_carry_the_selectors_labels_and_who_manages_them() -> None:
    labels = names.child_labels("chat")
    assert labels.items() > names.selector_labels("chat").items()
    assert labels["app.kubernetes.io/managed-by"] == "pagedserve-operator"


def test_the_owner_reference_lets_the_collector_take_children_and_holds_no_deletion_back() -> None:
    assert OWNER.reference() == {
        "apiVersion": "pagedserve.dev/v1alpha1",
        "kind": "InferenceService",
        "name": "chat",
        "uid": "uid-1",
        "controller": True,
        "blockOwnerDeletion": False,
    }


def test_ownership_is_by_uid_and_never_by_name() -> None:
    owned = {"metadata": {"ownerReferences": [{"uid": "other"}, OWNER.reference()]}}
    assert OWNER.owns(owned)
    assert not Owner(OWNER.key, "uid-2").owns(owned)
    for free in ({}, {"metadata": {}}, {"metadata": {"ownerReferences": None}}):
        assert not OWNER.owns(free)


def test_the_longest_name_fits_into_labels_and_children_of_a_kind_have_names_of_their_own() -> None:
    # A label's value is what allows the least: 63 characters.
    longest = "a" * 50
    assert max(map(len, names.child_labels(longest).values())) <= 63
    assert len({longest, names.claim_name(longest), names.chat_template_name(longest)}) == 3


def test_a_key_reads_as_kubectl_prints_it() -> None:
    assert str(Key("models", "chat")) == "models/chat"
    assert sorted([Key("b", "a"), Key("a", "b")]) == [Key("a", "b"), Key("b", "a")]
