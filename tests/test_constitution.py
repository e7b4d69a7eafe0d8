"""Constitutions: what their files may say, which principle is drawn for which prompt, and the ones that are shipped."""

import collections

import pytest

from rlhf_jax.data import world_critiques
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import constitution
from rlhf_jax.feedback.constitution import SHIPPED, Constitution, Principle, read

BOTH = '[[principle]]\nname = "a"\ncritique = "Bad?"\nrevision = "Mend."\npreference = "Which?"\n'


def test_a_file_is_read_with_requests_that_are_missing(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'{BOTH}[[principle]]\nname = " b "\npreference = " Which? "\n[[principle]]\nname = "c"\n'
                    'critique = """\nIs it\nbad?\n"""\nrevision = "Mend."\n')  # fmt: skip
    found = read(str(file))
    assert found.principles == (
        Principle("a", "Bad?", "Mend.", "Which?"), Principle("b", preference="Which?"),
        Principle("c", "Is it\nbad?", "Mend."),
    )  # fmt: skip
    assert [one.name for one in found.of("revision")] == ["a", "c"]
    assert [one.name for one in found.of("preference")] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"name = 1\n" + BOTH.encode(), r"mine.toml has 'name' outside its principles; write \[\[principle\]\] above"),
        (b"", "mine.toml has no principle"),
        (b"principle = 3", "mine.toml has no principle"),
        (b"[principle]\nname = 'a'", "mine.toml has no principle"),
        (b"[[principle]]\nname = ", "mine.toml can't be read .*; mend it"),
        (b"\xff", "mine.toml is not UTF-8 text; give --constitution another file"),
        ((BOTH + BOTH).encode(), "has two principles 'a'; give each its own name"),
        (b"[[principle]]\npreference = 'Which?'", "principle 1 of the constitution .*mine.toml has no name"),
        (
            BOTH.encode() + b"[[principle]]\nname = 'b'",
            r"principle 2 \(b\) of .* asks for nothing; give it a preference",
        ),
        (b"[[principle]]\nname = 'b'\ncritique = 'Bad?'", r"principle 1 \(b\) of .* has a critique and no revision"),
        (b"[[principle]]\nname = 'b'\nrevision = 'Mend.'", r"principle 1 \(b\) of .* has a revision and no critique"),
        (
            b"[[principle]]\nname = 'b'\nprefer = 'W'",
            "has 'prefer', which is not read; the nearest is preference",
        ),
        (b"[[principle]]\nname = 'b'\npreference = ' '", r"principle 1 \(b\) of .* has a preference that is no text"),
        (b"[[principle]]\nname = 3\npreference = 'W'", "principle 1 of .* has a name that is no text"),
    ],
)
def test_what_can_not_be_used_is_named(tmp_path, text, says):
    file = tmp_path / "mine.toml"
    file.write_bytes(text)
    with pytest.raises(UserError, match=says) as error:
        read(str(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["", "general.toml", "no/such.toml"])
def test_a_file_that_is_not_there_is_named_with_those_that_are_shipped(path):
    with pytest.raises(UserError, match="there is no constitution .*; give --flag general, world or a .toml file"):
        read(path, "--flag")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_ones_may_be_drawn_for_both_uses(name):
    found = read(name)
    assert len(found.of("revision")) >= 2 and len(found.of("preference")) >= 2
    assert all("{" not in "".join(one) and one.preference.endswith("?") for one in found.principles)


def test_the_general_one_has_a_dozen_principles():
    assert len(read("general").principles) == 12


def test_the_one_of_the_world_says_what_its_documents_say():
    ours = [tuple(one) for one in read("world").principles]
    assert ours == [(p.name, p.critique, p.revision, p.preference) for p in world_critiques.PRINCIPLES]


FIVE = Constitution("five", tuple(Principle(f"p{n}", "Bad?", "Mend.", "Which?") for n in range(5)))


def test_a_principle_is_drawn_by_seed_use_round_and_place_alone():
    drawn = FIVE.draw("revision", 3, range(50), 2)
    assert FIVE.draw("revision", 3, [41, 7], 2) == [drawn[41], drawn[7]]
    others = FIVE.draw("revision", 4, range(50), 2), FIVE.draw("revision", 3, range(50), 1)
    assert drawn not in (*others, FIVE.draw("preference", 3, range(50), 2))


def test_principles_are_drawn_alike_and_those_without_the_use_never():
    more = FIVE._replace(principles=(*FIVE.principles, Principle("none", preference="Which?")))
    count = collections.Counter(one.name for one in more.draw("revision", 0, range(5000)))
    assert set(count) == {f"p{n}" for n in range(5)}
    assert all(abs(number - 1000) < 4 * (5000 * 0.2 * 0.8) ** 0.5 for number in count.values())
    with pytest.raises(UserError, match="no principle of five has a preference; give one of them one"):
        FIVE._replace(principles=(Principle("c", "Bad?", "Mend."),)).draw("preference", 0, [0])


def test_every_shipped_file_has_a_name():
    assert sorted(file.stem for file in constitution.FOLDER.iterdir()) == sorted(SHIPPED)
