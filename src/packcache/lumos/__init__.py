"""The Lumos-1 engine, from files to clips.

files in     load: config, weights, text, hub, cosmos
the network  model, vocab, schedule, decode
clips out    pipeline, clip, codec, image
kept safe    journal: saved (one frame's bytes), sealed (files that are whole or not there)
known ahead  plan: course (the cache without memory), memory (sums), stock (upstream's), cost
"""
