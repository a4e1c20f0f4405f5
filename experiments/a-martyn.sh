#!/bin/sh
# The whole argument at the paper's scale, without training it anew: published weights, imported, deepened and probed.
#
# Command:   sh experiments/a-martyn.sh WEIGHTS RESULTS
#            WEIGHTS: a folder with plainnet20.pt, plainnet20.csv, ..., resnet56.pt, resnet56.csv: copies of
#            pretrained/*.pt and results/*.csv (not of results/a/, which is another run) of
#            https://github.com/a-martyn/resnet (commit a977915, BSD-3-Clause).
#            RESULTS: a folder; with that of this repository, its nets are given their weights back
# Expected:  test errors as published: plain 9.69, 10.04, 11.56, 13.07 %; residual 8.04, 7.79, 7.51, 7.46 %
# Source:    their logs; He et al. 2015, sections 1 and 4.2, for the construction and the responses; Veit et al. 2016
#            (arXiv:1605.06431), Balduzzi et al. 2017 (arXiv:1702.08591), Li et al. 2018 (arXiv:1712.09913)
# Measured:  see results/a-martyn
# Hardware:  2 CPU cores, about an hour and a half; genuine CIFAR-10
set -eu
weights=$1 results=$2

for block in plain residual; do
  for depth in 20 32 44 56; do
    case $block in plain) name=plainnet$depth ;; residual) name=resnet$depth ;; esac
    degrade import "$weights/$name.pt" --block $block --depth $depth --out "$results" --study a-martyn \
      --source "https://github.com/a-martyn/resnet, commit a977915, BSD-3-Clause" \
      --mean 0.4918687901200927,0.49185976472299225,0.4918583862227116 \
      --std 0.24697121702736,0.24696766978537033,0.2469719877121087 --set padding=black \
      --log "$weights/$name.csv" --columns train_error=train_err,test_error=test_err \
      --departure "per-channel mean and standard deviation instead of the per-pixel mean" \
      --departure "the log's training error is of augmented images, in eval mode; its last row here is of clean ones" \
      --departure "164 epochs of 391 steps, the last batch of each smaller: 64,124 steps"
  done
done

degrade probe "$results/a-martyn" --probes responses,lesion
degrade probe "$results/a-martyn" --probes landscape --depths 20,56 --budget 8m
degrade probe "$results/a-martyn" --probes bn --depths 20,56 --images 10000
degrade probe "$results/a-martyn" --probes gradients --depths 20,56
degrade identity "$results"/a-martyn/plain-20-* --depth 56 --steps 782 --lr 0.01
degrade identity "$results"/a-martyn/residual-20-* --depth 56 --steps 391 --lr 0.01
degrade plot "$results"
degrade report "$results"
