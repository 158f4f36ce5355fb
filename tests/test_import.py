import subprocess
import sys

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "streamlit", "numpy", "PIL", "pydantic")


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
    )


def test_importing_mmpeft_loads_nothing_outside_the_standard_library():
    added = loaded_by("import mmpeft") - loaded_by("pass") - set(sys.stdlib_module_names)
    assert {name for name in added if not name.startswith("__editable__")} == {"mmpeft"}


def test_the_top_help_loads_no_model_library():
    run = "import mmpeft.cli as c; c.make_app(['--help'])"
    assert not loaded_by(run) & {"torch", "diffusers", "transformers", "peft", "streamlit"}


def test_importing_the_library_does_not_change_the_environment():
    code = "import os; before = dict(os.environ); import mmpeft.cli, mmpeft.config; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_adapter_and_the_bank_do_not_load_streamlit_or_diffusers_at_import():
    assert not loaded_by("import mmpeft.adapter, mmpeft.adapter_file, mmpeft.bank") & {
        "diffusers",
        "streamlit",
    }
