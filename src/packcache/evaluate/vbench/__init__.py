"""VBench-I2V for people with weights: what is asked, the clips, a look at them, the scores."""
