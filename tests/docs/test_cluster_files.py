"""The files for clusters in docs/guides/many-gpus.md: their form, their shell, and that oribi knows every flag in them."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from oribi.cli.train import train
from oribi.config import SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "many-gpus.md"
TEXT = PAGE.read_text(encoding="utf-8")


def block(heading: str) -> str:
    """The file under a heading of the page."""
    return re.search(rf"^### {re.escape(heading)}.*?```text\n(.*?)```", TEXT, re.M | re.S).group(1)


def require_known_flags(words: list[str]) -> None:
    """Every flag behind `oribi train` is a setting or an option of the command."""
    flags = {word[2:] for word in words[words.index("train") :] if word.startswith("--")}
    assert "resume" in flags  # what is started again goes on
    assert flags <= {*SETTINGS, *inspect.signature(train).parameters}


def require_shell(script: str) -> None:
    if sys.platform != "win32":
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


def words_of(script: str) -> list[str]:
    """Of the line that trains, with what it continues in."""
    (line,) = [one for one in script.replace("\\\n", " ").splitlines() if " train " in one]
    return shlex.split(line)


def test_slurm_saves_before_the_time_is_up_and_goes_back_into_the_queue():
    script = block("Slurm")
    require_shell(script)
    require_known_flags(words_of(script))
    asked = " ".join(line for line in script.splitlines() if line.startswith("#SBATCH"))
    assert all(part in asked for part in ("--signal=TERM@", "--requeue", "--ntasks-per-node=1"))
    assert "-eq 143 ] && scontrol requeue" in script


def test_a_train_job_starts_torchrun_on_every_node():
    job = yaml.safe_load(block("Kubernetes, with Kubeflow Trainer"))
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert set(job["spec"]) == {"runtimeRef", "trainer"}
    assert set(job["spec"]["trainer"]) <= {
        "image",
        "numNodes",
        "command",
        "args",
        "env",
        "resourcesPerNode",
        "numProcPerNode",
    }
    require_known_flags(job["spec"]["trainer"]["command"])


def test_a_job_set_meets_at_its_first_pod():
    job = yaml.safe_load(block("Kubernetes, with JobSet"))
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (one,) = job["spec"]["replicatedJobs"]
    spec = one["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 2
    assert spec["backoffLimit"] == 0  # a failed pod ends the job, and the set starts all of them again
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    command = container["command"]
    require_known_flags(command)
    assert command[command.index("--nodes") + 1] == str(spec["parallelism"])
    # pods are SET-JOB-INDEX-POD.SET
    name = job["metadata"]["name"]
    assert command[command.index("--rendezvous") + 1].startswith(f"{name}-{one['name']}-0-0.{name}:")
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


def test_sky_pilot_trains_on_all_of_its_nodes():
    task = yaml.safe_load(block("SkyPilot"))
    assert set(task) <= {"name", "num_nodes", "resources", "file_mounts", "workdir", "setup", "run", "envs"}
    require_shell(task["setup"])
    require_shell(task["run"])
    words = words_of(task["run"])
    require_known_flags(words)
    (mount,) = task["file_mounts"]
    assert words[words.index("--output_dir") + 1].startswith(f"{mount}/")


@pytest.mark.parametrize("line", [line for line in TEXT.splitlines() if line.startswith("oribi train")])
def test_commands_on_the_page_have_flags_that_oribi_knows(line):
    flags = {word[2:] for word in shlex.split(line) if word.startswith("--")}
    assert flags <= {*SETTINGS, *inspect.signature(train).parameters}
