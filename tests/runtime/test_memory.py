"""Memory that may still be taken, as the kernel and a container tell it."""

from cnn.runtime import memory


def test_the_smaller_of_machine_and_container_counts(tmp_path, monkeypatch):
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(memory, "_CGROUP", group)
    assert memory.available_memory() is None
    meminfo.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert memory.available_memory() == 5000 * 1024
    group.mkdir()
    (group / "memory.max").write_text("max\n")
    assert memory.available_memory() == 5000 * 1024
    (group / "memory.max").write_text("3000\n")
    (group / "memory.current").write_text("2500\n")
    (group / "memory.stat").write_text("anon 100\ninactive_file 700\n")
    assert memory.available_memory() == 1200
