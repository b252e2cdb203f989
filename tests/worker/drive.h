/* Drives an engine in a test: requests in as JSON, everything that comes back kept per stream, and
 * put into one text that two runs can be compared by, bit for bit.
 */
#ifndef QV_TESTS_WORKER_DRIVE_H
#define QV_TESTS_WORKER_DRIVE_H

#include "worker/engine.h"

enum { DRIVE_MAX_REQUESTS = 256, DRIVE_MAX_STREAMS = 8, DRIVE_MAX_DELTAS = 512 };

/* One message of a stream: a token and what came with it. */
typedef struct {
    int64_t seq;
    int32_t token; /* -1: a delta without one */
    size_t text_size;
    double logprob; /* NaN unless asked */
} drive_delta;

typedef struct {
    drive_delta deltas[DRIVE_MAX_DELTAS];
    int32_t n_deltas;
    char text[8192];
    size_t text_size;
    char finish[32]; /* "" while it runs */
    char digest[65];
    qv_msg_usage usage;
    char *scores; /* prompt logprobs and alternatives as text; NULL unless asked */
    char *tops;   /* alternatives of the answer as text */
} drive_stream;

typedef struct {
    bool failed;
    qv_code code;
    char message[QV_ERROR_MAX];
    drive_stream *streams; /* [DRIVE_MAX_STREAMS] */
    int64_t n_left;        /* streams that have not ended */
} drive_request;

typedef struct {
    qv_engine *engine;
    drive_request requests[DRIVE_MAX_REQUESTS]; /* by number */
    uint64_t n_requests;
    int64_t n_open; /* requests without an end */
    struct {
        char name[64], reason[QV_ERROR_MAX];
        qv_adapter_phase phase;
        qv_code code;
        bool pin;
    } events[64];
    int n_events;
} drive;

/* Small settings for the bundled model, which a test changes before it opens. */
qv_engine_options drive_options(const char *model_dir);

/* Opens; asserts that it works. `metrics` may be NULL. */
drive *drive_open(const qv_engine_options *options);
drive *drive_open_metrics(const qv_engine_options *options, qv_metrics *metrics);

/* Loads an adapter and waits for its end; asserts that it is ready. */
void drive_load(drive *d, const char *name, const char *dir);

/* Asserts that everything has ended and every page and slot is free, and closes. */
void drive_close(drive *d);

/* Submit {"type":"submit","id":"t", ...}: `json` is what stands for the dots, with ' for ". The
 * request's number. A refusal is kept like an error that comes later. */
uint64_t drive_submit(drive *d, const char *json);
uint64_t drive_resume(drive *d, const char *json, uint64_t seed, const qv_msg_resume *resume,
                      uint32_t n_resume);

/* One step; waits for the loader when there is nothing else to do. */
void drive_step(drive *d);

/* Until every request has ended. */
void drive_run(drive *d);

drive_request *drive_get(drive *d, uint64_t number);
drive_stream *drive_stream_of(drive *d, uint64_t number, int index);

/* All that a request answered, with floats in hexadecimal. The caller frees. */
char *drive_signature(drive *d, uint64_t number);

#endif
