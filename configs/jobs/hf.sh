# A job of Hugging Face Jobs, stopped after $hours hours. The image is this repository's Dockerfile: docs/cloud.md.
hf jobs run --detach --flavor $flavor --timeout ${hours}h --secrets HF_TOKEN --name $name $image \
    $command
