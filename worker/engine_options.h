/* The engine's settings as option rows, shared by every program that runs one.
 *
 *     typedef struct { qv_engine_options engine; bool quiet; } settings;
 *
 *     static const qv_option table[] = {
 *         QV_ENGINE_OPTIONS(settings, engine),
 *         QV_OPTION(settings, quiet, FLAG, "quiet", NULL, NULL, "Print no progress."),
 *     };
 */
#ifndef QV_WORKER_ENGINE_OPTIONS_H
#define QV_WORKER_ENGINE_OPTIONS_H

#include "common/options.h"
#include "worker/engine.h"

/* Rows for a member `m`, of type qv_engine_options, of the struct `st`. */
#define QV_ENGINE_OPTIONS(st, m)                                                                   \
    QV_OPTION(st, m.model_dir, STRING, "model", "DIR", NULL,                                       \
              "Model directory as Hugging Face lays it out: config.json, *.safetensors, "          \
              "tokenizer.json.",                                                                   \
              .required = true, .section = "Model"),                                               \
        QV_OPTION(st, m.max_context, INT, "max-context", "N", "0",                                 \
                  "Longest prompt and answer together, in tokens. 0: as long as the model was "    \
                  "made for, or as the KV pages last.",                                            \
                  .min = 0, .max = 16777216, .section = "Model"),                                  \
        QV_OPTION(st, m.load_format, STRING, "load-format", "NAME", "safetensors",                 \
                  "Where weights come from. safetensors: the model's files. dummy: made up for "   \
                  "the sizes in config.json, to measure what is not at hand.",                     \
                  .section = "Model"),                                                             \
        QV_OPTION(st, m.backend, STRING, "backend", "NAME", "cpu",                                 \
                  "What computes: cpu, or cuda where it is built in.", .section = "Device"),       \
        QV_OPTION(st, m.recorded, INT, "recorded-steps", "N", "256",                               \
                  "CUDA: decode steps of up to so many answers are recorded as graphs at start, "  \
                  "which saves their launches. 0: none.",                                          \
                  .min = 0, .max = 4096, .section = "Device"),                                     \
        QV_OPTION(st, m.overlap, STRING, "overlap", "on|off|auto", "auto",                         \
                  "Enqueue a step before the results of the one before are read, so that the "     \
                  "device does not wait for the host; answers are the same. auto: on for CUDA "    \
                  "without tp.",                                                                   \
                  .section = "Device"),                                                            \
        QV_OPTION(st, m.deterministic, FLAG, "deterministic", NULL, NULL,                          \
                  "CUDA: a token's bits follow from its sequence and its adapter alone, whatever " \
                  "else is in the batch and however a prompt is cut, as on CPUs. Slower, above "   \
                  "all for prompts.",                                                              \
                  .section = "Device"),                                                            \
        QV_OPTION(st, m.gemm, STRING, "gemm", "NAME", "exact",                                     \
                  "Matrix products of the CPU backend. exact: the same bits whatever else is in "  \
                  "the batch. openblas: may be faster for long prompts, without that promise.",    \
                  .section = "Device"),                                                            \
        QV_OPTION(st, m.arithmetic, STRING, "arithmetic", "NAME", "f32",                           \
                  "What the CPU backend computes in. f32: float32 throughout. bf16: values "       \
                  "between operations are rounded as on a device that computes in BF16.",          \
                  .section = "Device"),                                                            \
        QV_OPTION(st, m.threads, INT, "threads", "N", "0",                                         \
                  "Threads of the CPU backend. 0: one per core.", .min = 0, .max = 1024,           \
                  .section = "Device"),                                                            \
        QV_OPTION(st, m.tp, INT, "tp", "N", "1",                                                   \
                  "Ranks that share the model (tensor parallel): each has its part of every "      \
                  "layer, on a device of its own (CPU: on threads of its own).",                   \
                  .min = 1, .max = QV_MAX_RANKS, .section = "Device"),                             \
        QV_OPTION(st, m.ep, INT, "ep", "N", "1",                                                   \
                  "Groups of ranks that experts are shared out to, whole (expert parallel). 1: "   \
                  "each rank has a part of every expert. Must divide tp.",                         \
                  .min = 1, .max = QV_MAX_RANKS, .section = "Device"),                             \
        QV_OPTION(st, m.devices, STRING, "devices", "LIST", "",                                    \
                  "Devices of the ranks, for example 0,1. Default: the first tp.",                 \
                  .section = "Device"),                                                            \
        QV_OPTION(st, m.all_reduce, STRING, "all-reduce", "NAME", "auto",                          \
                  "CUDA: how ranks add up. nccl: through NCCL. direct: they write into each "      \
                  "other's memory, in one kernel with the norm that follows. auto: direct for "    \
                  "messages of up to 4 MiB with two ranks, a ninth of that with four, NCCL "       \
                  "beyond. Devices that cannot reach each other use NCCL.",                        \
                  .section = "Device"),                                                            \
        QV_OPTION(st, m.max_running, INT, "max-running", "N", "64",                                \
                  "Most answers computed at once; each holds KV pages and one state slot.",        \
                  .min = 1, .max = 4096, .section = "Batching"),                                   \
        QV_OPTION(st, m.max_waiting, INT, "max-waiting", "N", "1024",                              \
                  "Most answers queued behind those that run; more are refused as OVERLOADED.",    \
                  .min = 0, .max = 1048576, .section = "Batching"),                                \
        QV_OPTION(st, m.step_tokens, INT, "step-tokens", "N", "512",                               \
                  "Token budget of one step. Answers take one token each, prompts the rest.",      \
                  .min = 2, .max = 1048576, .section = "Batching"),                                \
        QV_OPTION(st, m.prefill_chunk, INT, "prefill-chunk", "N", "256",                           \
                  "Most tokens of one prompt in a step, so that a long prompt leaves room for "    \
                  "others. 0: the whole budget.",                                                  \
                  .min = 0, .max = 1048576, .section = "Batching"),                                \
        QV_OPTION(st, m.page_tokens, INT, "page-tokens", "N", "16",                                \
                  "Tokens of one page of the KV cache.", .min = 1, .max = 4096,                    \
                  .section = "Memory"),                                                            \
        QV_OPTION(st, m.kv_bytes, SIZE, "kv-bytes", "SIZE", "0",                                   \
                  "Memory for the KV cache. 0: room for max-running answers of 2048 tokens and "   \
                  "for one of the longest, but at most half of the memory that is free.",          \
                  .min = 0, .section = "Memory"),                                                  \
        QV_OPTION(st, m.swap_bytes, SIZE, "swap-bytes", "SIZE", "1G",                              \
                  "Host memory for the state of preempted answers, and of prompts that the n "     \
                  "answers of a request share. Beyond it tokens are computed again.",              \
                  .min = 0, .section = "Memory"),                                                  \
        QV_OPTION(st, m.prefix_cache, FLAG, "prefix-cache", NULL, "true",                          \
                  "Begin a prompt where an earlier one of the same adapter content has been. "     \
                  "Takes KV pages and state slots that nobody needs.",                             \
                  .section = "Memory"),                                                            \
        QV_OPTION(st, m.prefix_snapshots, INT, "prefix-snapshots", "N", "32",                      \
                  "State slots for the prefix cache, beyond those of running answers, which it "   \
                  "uses too while they are free.",                                                 \
                  .min = 0, .max = 65536, .section = "Memory"),                                    \
        QV_OPTION(st, m.prefix_every, INT, "prefix-every", "TOKENS", "1024",                       \
                  "The prefix cache takes a snapshot of a long prompt or answer every so many "    \
                  "tokens, besides those at the end of a prompt and where prompts part.",          \
                  .min = 1, .max = 16777216, .section = "Memory"),                                 \
        QV_OPTION(st, m.adapter_slots, INT, "adapter-slots", "N", "8",                             \
                  "Adapters on the device at once; more may be loaded and take turns. 0: serve "   \
                  "the base model alone.",                                                         \
                  .min = 0, .max = 1024, .section = "Adapters"),                                   \
        QV_OPTION(st, m.max_lora_rank, INT, "max-lora-rank", "N", "64",                            \
                  "Highest rank an adapter may have; every slot has room for it.", .min = 1,       \
                  .max = 1024, .section = "Adapters"),                                             \
        QV_OPTION(st, m.adapter_memory, SIZE, "adapter-memory", "SIZE", "0",                       \
                  "Memory that slots get on demand, all together, for adapters of routed experts " \
                  "and of the embedding; a load beyond it fails. 0: enough for a full adapter of " \
                  "the highest rank in every slot, but at most a quarter of what is free.",        \
                  .min = 0, .section = "Adapters"),                                                \
        QV_OPTION(st, m.max_adapter_bytes, SIZE, "max-adapter-bytes", "SIZE", "2G",                \
                  "Largest adapter file.", .min = 1, .section = "Adapters"),                       \
        QV_OPTION(                                                                                 \
            st, m.adapter_cache_bytes, SIZE, "adapter-cache-bytes", "SIZE", "4G",                  \
            "Host memory for copies of loaded adapters. Beyond it the ones used longest ago are "  \
            "dropped, and read again when a request asks for them.",                               \
            .min = 1, .section = "Adapters"),                                                      \
        QV_OPTION(st, m.preempt_every, INT, "preempt-every", "STEPS", "0",                         \
                  "Preempt a running answer every so many steps although nothing asks for it, to " \
                  "show that answers do not depend on it. 0: never.",                              \
                  .min = 0, .max = 1048576, .section = "Testing"),                                 \
        QV_OPTION(st, m.dump, STRING, "dump", "FILE", "",                                          \
                  "Write every intermediate of the first step to this safetensors file, to "       \
                  "compare with another engine.",                                                  \
                  .section = "Testing"),                                                           \
        QV_OPTION(st, m.break_rank, STRING, "break-rank", "RANK@STEP", "",                         \
                  "Let a rank fail at a step, for example 1@20, to show how a worker ends that "   \
                  "lost a device.",                                                                \
                  .section = "Testing")

#endif
