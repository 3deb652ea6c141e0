#!/usr/bin/env bash
# The paper's claims in miniature: several methods over several seeds with one teacher and one schedule, all of them
# evaluated on the test split, the shift splits and under corruptions. It only calls train.py and evaluate.py.
#
#   bash tests/study.sh methods shapes 5 30                # part, data set, seeds, epochs, then flags for every train.py
#   bash tests/study.sh methods cifar100 3 240 --teacher resnet32x4 --student resnet8x4 --clip ViT-L/14 --amp
#
# The parts: methods (the main table), sweeps (alpha, lam, templates, scale of RichKD), fraction-30 (30 % of the training
# images, or any other percentage; give more epochs), augmix (the student's images mixed). JOBS runs at a time, 1 by
# default. Runs lie below runs/study/<data set>, and the same command skips those that are finished. The reports end in
# results/<data set>-<part>.json, of which
#   python evaluate.py --compare results/<data set>-<part>.json
# makes the tables again.
set -euo pipefail
part=$1 dataset=$2 seeds=$3 epochs=$4
shift 4
root=runs/study/$dataset
mkdir -p "$root" results
echo "a photo of a {}" > "$root/one-template.txt"

runs() {  # a line a run: the name of its folder, then its own flags
    for seed in $(seq 0 $((seeds - 1))); do
        same="--seed $seed --epochs $epochs"
        case $part in
        methods)
            for method in kd richkd scratch crd dkd kd-ls richkd-l richkd-f; do
                echo "$method-s$seed $same --method $method"
            done
            echo "clip-alone-s$seed $same --alpha 0 --lam 0" ;;
        sweeps)
            for method in kd richkd; do
                echo "$method-s$seed $same --method $method"
            done
            for value in 0 0.3 0.5 0.9 1; do
                echo "alpha-$value-s$seed $same --alpha $value"
                echo "lam-$value-s$seed $same --lam $value"
            done
            echo "one-template-s$seed $same --prompts $root/one-template.txt"
            echo "clip-scale-1-s$seed $same --clip-scale 1"
            echo "average-logits-s$seed $same --average logits" ;;
        fraction-*)  # more passes over fewer images; the teacher too has only these
            percent=${part#fraction-}
            for method in kd richkd scratch; do
                echo "$method-$percent-s$seed $same --method $method --fraction $(printf 0.%02d "$percent")"
            done ;;
        augmix)
            for method in kd richkd; do
                echo "$method-augmix-s$seed $same --method $method --augmix"
            done ;;
        esac
    done
}

runs | FLAGS="--dataset $dataset $*" ROOT=$root xargs -P "${JOBS:-1}" -L 1 \
    bash -c 'python train.py $FLAGS --out "$ROOT/$0" "$@" > "$ROOT/$0.txt" && tail -n 1 "$ROOT/$0.txt"'
folders=$(runs | cut -d " " -f 1 | sed "s|^|$root/|")
if [ "$dataset" = shapes ]; then shift=--shift; fi
python evaluate.py --run $folders ${shift:-} --corruptions
python evaluate.py --run "$(grep -m 1 richkd <<< "$folders")" ${shift:-} --corruptions --fused --plot
python - $folders > "results/$dataset-$part.json" << 'END'
import json, pathlib, sys
reports = [json.loads(pathlib.Path(folder, "report.json").read_text()) for folder in sys.argv[1:]]
for report in reports:  # small: without the points of the reliability diagrams
    for row in report.values():
        if isinstance(row, dict):
            row.pop("calibration", None)
print("[" + ",\n".join(map(json.dumps, reports)) + "]")
END
python evaluate.py --compare "results/$dataset-$part.json"
