"""A package that is absent and one that fails to import are told apart: pip cures only one."""

import importlib
import subprocess
import sys

import pytest

from healpass.errors import missing_extra


def an_unknown_name():
    from json import no_such_name  # noqa: F401


def raised(action):
    with pytest.raises(ImportError) as caught:
        action()
    return str(missing_extra("healpass.integrations.x", "hf", caught.value))


def test_an_absent_package_is_cured_by_pip():
    message = raised(lambda: importlib.import_module("no_such_package"))
    assert "pip install 'healpass[hf]'" in message
    assert "no_such_package" in message


def test_an_absent_package_is_known_also_while_another_error_is_handled():
    def action():
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError:
            importlib.import_module("no_such_package")

    assert "pip install 'healpass[hf]'" in raised(action)


def test_a_package_that_fails_to_import_is_not():
    """As transformers reports a torchvision that was made for another torch."""

    def action():
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'PreTrainedModel'.") from error

    message = raised(action)
    assert message.splitlines()[0].endswith(
        "RuntimeError: operator torchvision::nms does not exist"
    )
    assert "pip install" not in message
    assert "Repair or remove the package" in message


def test_a_part_that_a_package_needs_is_named():
    def action():
        try:
            importlib.import_module("no_such_part")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("Could not import module 'x'.") from error

    assert "Install no_such_part." in raised(action)


def test_another_version_is_cured_by_the_version_that_fits():
    message = raised(an_unknown_name)
    assert "in a version that healpass does not know" in message
    assert "pip install 'healpass[hf]'" in message


def test_a_broken_torchvision_is_named_by_the_integration(tmp_path):
    broken = tmp_path / "transformers"
    broken.mkdir()
    (broken / "__init__.py").write_text(
        "try:\n    raise RuntimeError('operator torchvision::nms does not exist')\n"
        "except RuntimeError as error:\n"
        "    raise ModuleNotFoundError('Could not import module') from error\n"
    )
    code = (
        f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import healpass.integrations.transformers\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision::nms does not exist" in done.stdout
    assert "pip install" not in done.stdout
