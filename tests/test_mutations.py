import ast
from pathlib import Path

import pytest
from mutations import MUTATIONS, ROOT, changed

TESTS = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_it_changes_the_code_and_names_tests_that_are_there(mutation):
    text = changed((ROOT / mutation.file).read_text(), mutation)
    ast.parse(text)
    for test in mutation.tests.split():
        path, *names = test.split("::")
        assert (ROOT / path).exists()
        for name in names:
            assert f"def {name}(" in TESTS or f"class {name}" in TESTS, test


def test_every_promise_has_one():
    assert {m.promise for m in MUTATIONS} >= {str(n) for n in (*range(1, 9), *range(10, 18))}
