"""`fjft plan`, on this machine's own devices."""

import json


def test_json_and_picture(call, llama, write_config, tmp_path):
    path = write_config(llama, tmp_path)
    picture = tmp_path / "plan.png"
    said = call(["plan", f"--config={path}", "--json", f"--picture={picture}"])
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert found["fits"] is True
    assert found["batch_size"] == 2
    assert sum(found["parts"].values()) == found["peak_bytes"]
    assert picture.is_file()


def test_an_unknown_target(fail, llama, write_config, tmp_path):
    path = write_config(llama, tmp_path)
    assert "v5e-N" in fail(["plan", f"--config={path}", "--target=v5e"])


def test_write_without_tune(call, llama, write_config, tmp_path):
    path = write_config(llama, tmp_path)
    said = call(["plan", f"--config={path}", "--write=x.py"])
    assert said.code == 2
    assert "--write goes with --tune" in said.err
