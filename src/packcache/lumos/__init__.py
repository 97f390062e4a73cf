"""The Lumos-1 engine, from files to clips.

files in     config, weights, text, hub, cosmos (all called by packcache.models)
the network  model, vocab, schedule, decode
clips out    pipeline, clip, codec, image
kept safe    journal: saved (one frame's bytes), sealed (files that are whole or not there)
known ahead  plan: course (the cache without memory), memory (sums), stock (upstream's), cost
"""
