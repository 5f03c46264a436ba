"""The main job on a real pretrained model: a model, a training, and ways to ask."""
