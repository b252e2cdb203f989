/* A set of jobs that run together: submit them, follow every stream, print what arrives.
 *
 * One thread. Strings and arrays of the jobs live in the arena that the caller owns.
 */
#ifndef QV_CLIENTS_CLI_JOBS_H
#define QV_CLIENTS_CLI_JOBS_H

#include "clients/cli.h"

typedef struct {
    const qv_msg_submit *jobs;
    size_t n_jobs;
    size_t concurrency; /* jobs in flight at once */
    int64_t timeout_ms; /* give up after this long without any message */
    bool json;          /* print every message as it comes, one JSON object a line */
    bool verbose;       /* a line about tokens, time and worker on stderr after each answer */
} cli_jobs_options;

/* Run all jobs to their end. With one answer to come its text goes to stdout as it arrives; with
 * several, one line an answer: redrawn in place as they grow when stdout is a terminal, else
 * printed when complete. Returns the exit code of the process. */
int cli_jobs_run(qv_client *client, const cli_jobs_options *options);

#endif
