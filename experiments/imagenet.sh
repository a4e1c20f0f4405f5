#!/bin/sh
# The degradation on ImageNet: 34 layers against 18, plain and residual.
#
# Command:   sh experiments/imagenet.sh IMAGES STORE RESULTS
#            IMAGES: a folder with train/<class>/*.JPEG and val/<class>/*.JPEG, of ImageNet or like it
#            STORE: a new folder on a disk with room for the decoded images, some 750 GB for ImageNet
# Expected:  top-1 error, 10 crops: plain-18 27.94, plain-34 28.54, residual-18 27.88, residual-34 25.03 %
# Source:    He et al. 2015, Table 2 and Fig. 4
# Measured:  not yet
# Hardware:  GPUs; days on one
set -eu
images=$1 store=$2 results=$3

degrade data pack "$images" "$store"
degrade sweep --dataset "imagenet:$store" --depths 18,34 --blocks plain,residual --out "$results"
degrade plot "$results"
degrade verdict "$results"
degrade probe "$results" --probes ten-crop
