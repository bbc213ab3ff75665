#!/usr/bin/env bash
# The first hour of somebody with a folder of photographs and a laptop, typed out:
#
#     tests/benchmarks/first_hour.sh PHOTOS OUT [MINUTES]
#
# look -> pretrain for MINUTES (10) -> verdict -> features as Parquet -> a folder that timm loads ->
# attention -> the report in Chromium at 1,400 and 400 pixels, if there is one. It stops at the first
# thing that fails, and says how long each part took.
set -euo pipefail

photos=$(realpath "$1"); out=$2; minutes=${3:-10}
mkdir -p "$out"; cd "$out"
xdino() { "${PYTHON:-python}" -m xdino_launch "$@"; }
part() { echo; echo "== $* (${SECONDS} s since the start)"; }

part look
xdino look "$photos" --minutes "$minutes" --out recipe.yaml

part pretrain
xdino pretrain auto --data.path "$photos" --minutes "$minutes" --run run

part features
xdino features run --data "$photos" --out features.parquet
"${PYTHON:-python}" - <<'PY'
import pyarrow.parquet

table = pyarrow.parquet.read_table("features.parquet")
print(table.num_rows, "rows:", ", ".join(table.column_names))
PY

part export
xdino export run --format hf --out exported
"${PYTHON:-python}" - <<'PY'
import timm
import torch

network = timm.create_model("local-dir:exported", pretrained=True).eval()
side = network.pretrained_cfg["input_size"]
print("timm:", type(network).__name__, tuple(network(torch.zeros(1, *side)).shape))
PY

part attention
mapfile -t some < <(find "$photos" -type f | sort | head -n 6)
xdino attention run "${some[@]}" --out run/attention

part report
xdino report run --out report.html
browser=$(command -v chromium || command -v google-chrome || true)
if [ -n "$browser" ]; then
  for width in 1400 400; do
    "$browser" --headless --no-sandbox --disable-gpu --enable-logging=stderr --v=0 \
      --window-size="$width,3000" --screenshot="report-$width.png" \
      "file://$(realpath report.html)" 2> "console-$width.log"
    grep -i "CONSOLE" "console-$width.log" || echo "$width pixels: console clean"
  done
fi
part done
ls -la
