"""`manyeyes doctor` tells what works here, and what mends the rest."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest


def doctor(*arguments, **environment):
    command = [sys.executable, "-m", "manyeyes.cli.main", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment or None, check=False)


@pytest.fixture(scope="module")
def bare():
    """Findings where neither Java nor Hadoop nor credentials are in sight."""
    done = doctor("--json", PATH="/nowhere", HOME="/nowhere")
    assert done.returncode == 0, done.stderr
    return {(finding["kind"], finding["name"]): finding for finding in json.loads(done.stdout)}


def test_engines_that_need_nothing_ran_a_job(bare):
    for name in ("inline", "local"):
        assert bare["engine", name]["status"] == "works"
        assert "ran a job" in bare["engine", name]["detail"]
    assert bare["file system", "file"]["status"] == "works"


def test_what_is_missing_comes_with_the_one_command_that_mends_it(bare):
    assert bare["engine", "spark"]["status"] == "missing"
    assert bare["engine", "spark"]["mend"].startswith("apt-get install openjdk")
    assert bare["engine", "hadoop"]["mend"].startswith("export HADOOP_HOME=")
    assert bare["file system", "hdfs"]["mend"].startswith("manyeyes doctor hdfs://")
    assert bare["file system", "s3"]["mend"].startswith("export AWS_ACCESS_KEY_ID=")
    assert bare["accelerator", "cuda"]["status"] == "absent"
    assert all("\n" not in finding["mend"] + finding["detail"] for finding in bare.values())


def test_an_extra_that_is_not_installed_is_named_with_its_pip_command(tmp_path):
    blocked = "import sys; sys.modules['matplotlib'] = None; from importlib import util; find = util.find_spec\n"
    blocked += (
        "util.find_spec = lambda name, *a: None if name in ('matplotlib', 's3fs', 'hdfs_native') else find(name, *a)\n"
    )
    code = blocked + "import json; from manyeyes import config, diagnosis\n"
    code += "found = [diagnosis._extra('plots', 'pictures', ['matplotlib']), diagnosis._hdfs(), diagnosis._s3()]\n"
    code += "print(json.dumps([config.to_dict(finding) for finding in found]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mends = [finding["mend"] for finding in json.loads(done.stdout)]
    assert mends == [f"pip install 'manyeyes[{extra}]'" for extra in ("plots", "hdfs", "s3")]


def test_a_place_that_is_not_there_fails_and_one_that_is_there_works(tmp_path):
    done = doctor("--engine", "inline", "--json", str(tmp_path), str(tmp_path / "nothing"))
    assert done.returncode == 1
    engine, there, nothing = json.loads(done.stdout)
    assert (engine["status"], there["status"], nothing["status"]) == ("works", "works", "broken")
    assert "there is nothing at" in nothing["detail"]
    assert nothing["mend"] == f"mkdir -p {tmp_path / 'nothing'}"


def test_an_engine_asked_for_by_name_has_to_work():
    assert doctor("--engine", "inline").returncode == 0
    done = doctor("--engine", "hadoop", PATH="/nowhere")
    assert done.returncode == 1
    assert "What mends it:" in done.stdout and "export HADOOP_HOME=" in done.stdout
    done = doctor("--engine", "spark", "--engine-set", "mastre=local[2]")
    assert done.returncode == 2 and "Did you mean master?" in done.stderr
    done = doctor("--engine", "flnk")
    assert done.returncode == 2 and "Unknown engine 'flnk'" in done.stderr


def test_what_is_wrong_with_s3_is_a_finding_and_no_end_of_the_others():
    code = "import json; from manyeyes import config, diagnosis; print(json.dumps(config.to_dict(diagnosis._s3())))"
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    for environment, detail, mend in (
        ({"AWS_PROFILE": "nobody"}, "profile (nobody) could not be found", "export AWS_PROFILE="),
        (keys | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "no S3 server answers", "export AWS_ENDPOINT_URL="),
    ):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={"HOME": "/none"} | environment)
        finding = json.loads(done.stdout)
        assert finding["status"] == "broken" and detail in finding["detail"] and finding["mend"].startswith(mend)


def test_a_configuration_that_is_not_there_is_named():
    done = doctor("--engine", "inline", "--engine-config", "missing.toml")
    assert done.returncode == 2
    assert "There is no engine configuration at missing.toml" in done.stderr
