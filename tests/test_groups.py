import pytest

from peft_loramoe.groups import ExpertGroups


pytestmark = pytest.mark.version_independent


def test_experts_are_numbered_group_by_group():
    groups = ExpertGroups([1, 3, 2])
    assert (len(groups), groups.num_experts) == (3, 6)
    assert groups.of_experts == (0, 1, 1, 1, 2, 2)
    assert [list(range(6))[part] for part in groups.slices] == [[0], [1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("null", "lora_experts"), [((), (0, 1, 2, 3, 4, 5)), ((1,), (0, 4, 5)), ((0, 2), (1, 2, 3)), ((0, 1, 2), ())]
)
def test_experts_of_null_groups_are_no_lora_experts(null, lora_experts):
    groups = ExpertGroups([1, 3, 2], null=null)
    assert groups.lora_experts == lora_experts
    assert groups.num_experts == 6  # the router has an output for each of them


def test_groups_are_equal_and_hashable_by_value():
    """A list, as JSON gives it, makes the same groups as a tuple."""
    listed, written = ExpertGroups([2, 2], [0], ["facts", "skills"]), ExpertGroups((2, 2), (0,), ("facts", "skills"))
    assert listed == written and len({listed, written}) == 1
    assert listed != ExpertGroups((2, 2), (1,), ("facts", "skills"))


def test_groups_cannot_be_changed():
    with pytest.raises(AttributeError):
        ExpertGroups([2, 2]).sizes = (4,)
