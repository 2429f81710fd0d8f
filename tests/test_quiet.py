"""What a start writes to standard error: nothing that is no message to the user."""

import importlib.util
import os
import subprocess
import sys
import textwrap


def told(code: str) -> str:
    """What a new process with this code writes to standard error."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_start_of_jax_says_nothing_where_the_cuda_plugin_finds_no_driver():
    assert importlib.util.find_spec("jax_cuda12_plugin") and importlib.util.find_spec("jax_plugins.xla_cuda12")
    assert told("from llava_jax import cli; cli.prepare(); import jax; jax.devices()") == ""
    assert "cudart_stub" in told("import jax; jax.devices()"), "without the package JAX says it: this test can fail"


def test_the_plugin_compiles_as_before():
    code = """
    from llava_jax.preflight import targets
    from llava_jax import cli
    cli.prepare()
    targets.prepare_environment()
    print(targets.devices(targets.parse("h100:8"))[0].device_kind)
    import jaxlib.gpu_linalg
    assert jaxlib.gpu_linalg._cuda_linalg
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("NVIDIA H100 80GB HBM3\n", "")


def test_workers_of_a_command_say_nothing_either(tmp_path):
    code = """
    import multiprocessing
    from llava_jax import cli

    def work():
        import jax
        jax.devices()

    def main():
        worker = multiprocessing.get_context("spawn").Process(target=work)
        worker.start()
        worker.join()
        return worker.exitcode

    if __name__ == "__main__":
        cli.run(main)
    """
    (tmp_path / "command.py").write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, str(tmp_path / "command.py")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_all_other_lines_are_written():
    code = """
    import os
    from llava_jax.quiet import without_driver_lines
    try:
        with without_driver_lines():
            os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are written to STDERR\\n")
            os.write(2, b"I0000 00:00:1795974487.718207   17168 cudart_stub.cc:31] Could not find cuda drivers\\n")
            os.write(2, b"E0000 00:00:1795974487.718207   17168 cuda_executor.cc:31] broken\\nno line end")
            raise ImportError
    except ImportError:
        os.write(2, b", after")
    """
    assert told(code) == "E0000 00:00:1795974487.718207   17168 cuda_executor.cc:31] broken\nno line end, after"


def test_a_closed_standard_error_is_no_fault():
    code = """if True:
    import os
    os.close(2)
    from llava_jax import cli
    cli.prepare()
    import jax
    print(jax.devices()[0].platform)
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert done.stdout == "cpu\n"
