"""What the preparation finds and loses of the planted corpus, and how fast it is.

Prints the shares for the default settings, for the rules of `prepare_quality.RULES`, and for these with the quality
classifier. `--size` is the number of documents (20,000 of 30 MB take some minutes), `--seed` makes another corpus.

With `--datatrove PYTHON`, the interpreter of an environment that has datatrove, its MinHash and its Gopher, C4 and
FineWeb filters do the same corpus in the same run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.bench.planted_corpus import Planted, make
from tests.bench.prepare_quality import RULES, references, run

_DATATROVE = """
import sys, time
from pathlib import Path
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import C4QualityFilter, FineWebQualityFilter
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
source, folder = sys.argv[1], sys.argv[2]
began, config = time.process_time(), MinhashConfig()
def go(name, *steps):
    LocalPipelineExecutor(list(steps), tasks=1, workers=1, logging_dir=f"{folder}/log-{name}").run()
quality = [GopherRepetitionFilter(), GopherQualityFilter(min_stop_words=0), C4QualityFilter(), FineWebQualityFilter()]
out = JsonlWriter(f"{folder}/clean", output_filename="${rank}.jsonl", compression=None)
go("filter", JsonlReader(source), *quality, out)
go("sign", JsonlReader(f"{folder}/clean"), MinhashDedupSignature(f"{folder}/sig", config=config))
for rank in [0]:
    LocalPipelineExecutor([MinhashDedupBuckets(f"{folder}/sig", f"{folder}/buckets", config=config)],
        tasks=config.num_buckets, workers=1, logging_dir=f"{folder}/log-buckets").run()
go("cluster", MinhashDedupCluster(f"{folder}/buckets", f"{folder}/remove", config=config))
last = JsonlWriter(f"{folder}/kept", output_filename="${rank}.jsonl", compression=None)
go("drop", JsonlReader(f"{folder}/clean"), MinhashDedupFilter(f"{folder}/remove"), last)
print("SECONDS", time.process_time() - began)
"""


def datatrove(python: str, planted: Planted, folder: Path) -> dict[str, Any]:
    """Return what datatrove keeps and loses of the corpus; it removes no passages and no items here."""
    source = folder / "source"
    source.mkdir(parents=True)
    lines = "".join(json.dumps(record) + "\n" for record in planted.records)
    (source / "planted.jsonl").write_text(lines, encoding="utf-8")
    script = folder / "pipeline.py"
    script.write_text(_DATATROVE, encoding="utf-8")
    done = subprocess.run([python, str(script), str(source), str(folder)], capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    stays = {
        json.loads(line)["id"] for path in (folder / "kept").glob("*.jsonl") for line in path.open(encoding="utf-8")
    }
    found = [not {copy, original} <= stays for copy, original, _ in planted.near]
    return {
        "junk kept": sum(name in stays for name in planted.junk) / len(planted.junk),
        "unique lost": sum(name not in stays for name in planted.unique) / len(planted.unique),
        "near pairs of which one is gone": sum(found) / len(found),
        "MB/s": len(lines.encode()) / 1e6 / float(done.stdout.split("SECONDS")[1]),
    }


def main() -> None:
    """Print one JSON object for each way of preparing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--datatrove", help="Python interpreter with datatrove")
    arguments = parser.parse_args()
    planted = make(arguments.size, arguments.seed)
    size = sum(len(record["text"].encode()) for record in planted.records)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        quality = {"name": "quality", "reference": str(references(folder, 2000, arguments.seed + 1))}
        for label, rules in (("default", None), ("rules", RULES), ("rules and quality", [*RULES, quality])):
            found, seconds = run(planted, folder / label, **({} if rules is None else {"rules": rules}))
            row = {"settings": label, "documents": len(planted.records), "MB/s": size / 1e6 / seconds, **found}
            print(json.dumps(row, ensure_ascii=False), flush=True)
        if arguments.datatrove:
            row = {"settings": "datatrove", **datatrove(arguments.datatrove, planted, folder / "datatrove")}
            print(json.dumps(row, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
