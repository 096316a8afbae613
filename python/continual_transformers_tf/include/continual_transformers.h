/* A whole model's step as one call, from C or anything with a C interface.
 *
 * A model file (written by `session.save` or `continual-transformers pack` in Python) is loaded
 * into a session. A stream is one endless sequence; a session remembers for each stream that it has
 * open what the model must know of its past. A step takes one token of each of several streams and
 * gives the model's outputs for them.
 *
 *     ct_session* session;
 *     if (ct_session_load("model.safetensors", NULL, &session)) puts(ct_last_error());
 *     ct_stream stream;
 *     ct_session_open(session, 1, &stream);
 *     const void* inputs[] = {x};      // The model's only input: here float[features].
 *     void* outputs[] = {y};
 *     while (read(x)) ct_session_step(session, &stream, 1, inputs, outputs);
 *     ct_session_free(session);
 *
 * Errors. A function that can fail returns a ct_status, which is CT_OK, 0, if it did not. Otherwise
 * ct_last_error() has a sentence: what was got, what was expected, how to mend it. Every stream is
 * then as it was before the call. No C++ exception leaves the library.
 *
 * Threads. Any function may be called by several threads at once, also for one session; except that
 * nothing else may be in progress when ct_session_free is called. While one thread's step of stream
 * a runs, another thread may step, copy, clean or close other streams, and open new ones, without
 * waiting; what it does to stream a waits for the step, and sees it whole or not at all. Steps in
 * progress end with the old weights when new ones are loaded.
 *
 * Fork. A child process may go on using its copy of a session. A stream that another thread was
 * stepping when the process forked is closed in the child.
 *
 * Arrays are contiguous, rows first, little-endian. M is the number of streams of a call, T the
 * number of steps.
 */

#ifndef CONTINUAL_TRANSFORMERS_H_
#define CONTINUAL_TRANSFORMERS_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Of this header; ct_version() tells the library's. */
#define CT_VERSION_MAJOR 0
#define CT_VERSION_MINOR 1
#define CT_VERSION_PATCH 0

#if defined(__GNUC__)
#define CT_API __attribute__((visibility("default")))
#else
#define CT_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* A model with its weights, and its streams. */
typedef struct ct_session ct_session;

/* A stream's id. It is never 0 nor negative. The id of a stream that was closed is refused for
 * ever. */
typedef int64_t ct_stream;

typedef enum ct_status {
  CT_OK = 0,
  CT_INVALID_ARGUMENT = 1, /* A shape, dtype, value or option that does not fit. */
  CT_BAD_MODEL_FILE = 2,   /* A file that is truncated, foreign, newer, or wrong inside. */
  CT_UNKNOWN_STREAM = 3,   /* An id that was never given out, or was closed. */
  CT_TOO_MANY_STREAMS = 4, /* No room for another stream: by the session's limit or by memory. */
  CT_OTHER_MODEL = 5,      /* State or weights of another model or another training. */
  CT_IO = 6,               /* A file that cannot be read or written. */
  CT_INTERNAL = 7,         /* A fault of the library. */
  CT_OUT_OF_MEMORY = 8
} ct_status;

typedef enum ct_dtype {
  CT_DTYPE_OF_FILE = 0, /* In ct_options only: as the model file has it. */
  CT_FLOAT32 = 1,
  CT_FLOAT64 = 2,
  CT_BFLOAT16 = 3,
  CT_FLOAT16 = 4,
  CT_INT32 = 5,
  CT_INT64 = 6,
  CT_BOOL = 7 /* One byte, 0 or 1. */
} ct_dtype;

/* How a session is made. Begin with CT_OPTIONS_DEFAULT: later versions may add to the end, and tell
 * by `size` what the caller knows. */
typedef struct ct_options {
  size_t size;            /* sizeof(ct_options) */
  int64_t streams;        /* The most streams that may be open at once; 0: no limit. */
  int64_t threads;        /* That one call may use; 1: the caller's only. */
  ct_dtype cache_dtype;   /* Of keys and values: CT_FLOAT32, CT_BFLOAT16, CT_FLOAT16; CT_FLOAT64. */
  ct_dtype weights_dtype; /* Of dense kernels: CT_FLOAT32, CT_BFLOAT16; CT_FLOAT64. */
} ct_options;

#define CT_OPTIONS_DEFAULT {sizeof(ct_options), 0, 1, CT_DTYPE_OF_FILE, CT_DTYPE_OF_FILE}

/* The library's version: "0.1.0". */
CT_API const char* ct_version(void);

/* The sentence of the calling thread's last error, "" before there is any. It lasts until the
 * thread's next error. */
CT_API const char* ct_last_error(void);

/* ---- Sessions ---- */

/* Loads a model file. The file is mapped into memory; its weights are copied as the processor wants
 * them. `options` NULL: the defaults. On error *session is NULL.
 * Errors: CT_IO, CT_BAD_MODEL_FILE; CT_INVALID_ARGUMENT for options that do not fit the model. */
CT_API ct_status ct_session_load(const char* path, const ct_options* options, ct_session** session);

/* The same from the file's bytes, which are copied. */
CT_API ct_status ct_session_load_memory(const void* data, size_t bytes, const ct_options* options,
                                        ct_session** session);

/* Frees a session and closes its streams. NULL is fine. */
CT_API void ct_session_free(ct_session* session);

/* Writes the model file, with the weights that are loaded: whole or not at all. Error: CT_IO. */
CT_API ct_status ct_session_save(const ct_session* session, const char* path);

/* Replaces the weights by those of a file of the same model. Streams stay and go on with them.
 * Errors: CT_IO, CT_BAD_MODEL_FILE, CT_OTHER_MODEL; the session then has the old weights. */
CT_API ct_status ct_session_load_weights(ct_session* session, const char* path);
CT_API ct_status ct_session_load_weights_memory(ct_session* session, const void* data,
                                                size_t bytes);

/* ---- Streams ---- */

/* Opens `count` streams, or none, and writes their ids to streams[count]. It costs the same however
 * many are open, and waits for no step. Error: CT_TOO_MANY_STREAMS. */
CT_API ct_status ct_session_open(ct_session* session, int64_t count, ct_stream* streams);

/* Closes streams, or none; waits for steps in progress on them. Errors: CT_UNKNOWN_STREAM,
 * CT_INVALID_ARGUMENT where one is named twice. */
CT_API ct_status ct_session_close(ct_session* session, const ct_stream* streams, int64_t count);

/* Takes one step of `count` streams, which must be distinct.
 *
 * streams: [M]. NULL: the first M default streams, which the session opens when they are first
 *   needed, and opens again after they were closed.
 * inputs:  one pointer for each input of the model, to an array [M, ...]: see ct_session_input.
 * outputs: one pointer for each output, to room for an array [M, ...]; NULL: not wanted. Inputs and
 *   outputs must not overlap.
 *
 * M = 0 is fine, and does nothing. A step allocates no memory once one of as many streams has been
 * taken. Before a stream has taken ct_session_receptive_field steps its window is not full, and
 * attention is over what there is.
 * Errors: CT_UNKNOWN_STREAM; CT_TOO_MANY_STREAMS for default streams; CT_INVALID_ARGUMENT for a
 * stream named twice, or a token that an embedding has no row for. */
CT_API ct_status ct_session_step(ct_session* session, const ct_stream* streams, int64_t count,
                                 const void* const* inputs, void* const* outputs);

/* Takes `steps` steps of each stream: arrays are [M, T, ...], each stream's steps in order.
 * key_mask: [M, T], false where a step is a gap, whose key no query attends to, now or later. NULL:
 *   there is none. */
CT_API ct_status ct_session_steps(ct_session* session, const ct_stream* streams, int64_t count,
                                  int64_t steps, const void* const* inputs, void* const* outputs,
                                  const bool* key_mask);

/* Makes streams begin again, all or none; waits for steps in progress on them.
 * Errors: CT_UNKNOWN_STREAM, CT_INVALID_ARGUMENT where one is named twice. */
CT_API ct_status ct_session_clean(ct_session* session, const ct_stream* streams, int64_t count);

/* Makes all streams that are open begin again, one after the other. */
CT_API ct_status ct_session_clean_all(ct_session* session);

/* Writes to positions[count] how many steps each stream has taken. It does not wait: a step in
 * progress is not counted. streams NULL: of the first `count` default streams, 0 where one is not
 * open. Error: CT_UNKNOWN_STREAM. */
CT_API ct_status ct_session_positions(const ct_session* session, const ct_stream* streams,
                                      int64_t count, int64_t* positions);

/* Writes to ready[count] whether the window of each stream is full: whether it has taken as many
 * steps as the receptive field has. Otherwise as ct_session_positions. */
CT_API ct_status ct_session_ready(const ct_session* session, const ct_stream* streams,
                                  int64_t count, bool* ready);

/* How many streams are open. */
CT_API int64_t ct_session_open_streams(const ct_session* session);

/* ---- Copies of streams ---- */

/* The size of a copy of one stream, in bytes. */
CT_API int64_t ct_session_state_bytes(const ct_session* session);

/* Copies one stream to state[bytes]; waits for a step in progress on it. `bytes` must be
 * ct_session_state_bytes. A copy is the same on every machine. Fingerprints in front of it tell of
 * which model and weights it is. Errors: CT_UNKNOWN_STREAM, CT_INVALID_ARGUMENT. */
CT_API ct_status ct_session_get_state(const ct_session* session, ct_stream stream, void* state,
                                      int64_t bytes);

/* Puts copies back into `count` streams, or into none: everything is checked before the first one
 * changes. states: [count] pointers, bytes: [count].
 * Errors: CT_UNKNOWN_STREAM; CT_OTHER_MODEL for a copy of another model, or, unless other_weights,
 * of the same model with other weights; CT_INVALID_ARGUMENT for bytes that are no copy, or cut off,
 * and for a stream named twice. */
CT_API ct_status ct_session_set_states(ct_session* session, const ct_stream* streams, int64_t count,
                                       const void* const* states, const int64_t* bytes,
                                       bool other_weights);

/* The same for one stream. */
CT_API ct_status ct_session_set_state(ct_session* session, ct_stream stream, const void* state,
                                      int64_t bytes, bool other_weights);

/* ---- What the model is ---- */

/* An input or output of the model. */
typedef struct ct_value {
  const char* name; /* This and `shape` last as long as the session. */
  ct_dtype dtype;
  int64_t rank;
  const int64_t* shape; /* [rank], of one step of one stream. */
  int64_t elements;     /* Of one step of one stream. */
  int64_t bytes;        /* Of one step of one stream. */
} ct_value;

/* How many inputs and outputs there are. */
CT_API int64_t ct_session_inputs(const ct_session* session);
CT_API int64_t ct_session_outputs(const ct_session* session);

/* Describes input or output number i. Error: CT_INVALID_ARGUMENT. */
CT_API ct_status ct_session_input(const ct_session* session, int64_t i, ct_value* value);
CT_API ct_status ct_session_output(const ct_session* session, int64_t i, ct_value* value);

/* The model's name. It lasts as long as the session, as the plan does. */
CT_API const char* ct_session_name(const ct_session* session);
/* The plan, as the model file has it: JSON. */
CT_API const char* ct_session_plan(const ct_session* session);
/* Steps that an output depends on, the newest among them. */
CT_API int64_t ct_session_receptive_field(const ct_session* session);
/* Steps between an input and the output that belongs to it. */
CT_API int64_t ct_session_delay(const ct_session* session);
/* What keys and values, and dense kernels, are kept in. */
CT_API ct_dtype ct_session_cache_dtype(const ct_session* session);
CT_API ct_dtype ct_session_weights_dtype(const ct_session* session);
/* Hashes of the plan and the cache dtype, and of the weights: those in copies of streams. */
CT_API uint64_t ct_session_plan_fingerprint(const ct_session* session);
CT_API uint64_t ct_session_weights_fingerprint(const ct_session* session);
/* Roughly how long a call takes on one thread, in nanoseconds. */
CT_API int64_t ct_session_estimate(const ct_session* session, int64_t streams, int64_t steps);

/* Where the memory is, in bytes. */
typedef struct ct_memory {
  int64_t weights;          /* As they are computed with. */
  int64_t model_file;       /* Mapped, or copied from memory. */
  int64_t streams;          /* Blocks of streams that were stepped, and not given back. */
  int64_t streams_overhead; /* What is kept beside them. */
  int64_t arenas;           /* What calls work in. */
} ct_memory;

/* Writes a ct_memory of `size` bytes, sizeof(ct_memory). Error: CT_INVALID_ARGUMENT. */
CT_API ct_status ct_session_memory(const ct_session* session, ct_memory* memory, size_t size);

#ifdef __cplusplus
}
#endif

#endif /* CONTINUAL_TRANSFORMERS_H_ */
