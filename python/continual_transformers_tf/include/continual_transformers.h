/* The C interface: one call takes a step of a whole model.
 *
 * A session loads a model file, which `session.save` or `continual-transformers pack` in Python
 * writes. A stream is one endless sequence. For each open stream, a session keeps what the model
 * needs of the stream's past. A step takes one token for each of several streams and returns the
 * model's outputs for them.
 *
 *     ct_session* session;
 *     if (ct_session_load("model.safetensors", NULL, &session)) puts(ct_last_error());
 *     ct_stream stream;
 *     ct_session_open(session, 1, &stream);
 *     const void* inputs[] = {x};      // This model has one input, float[features].
 *     void* outputs[] = {y};
 *     while (read(x)) ct_session_step(session, &stream, 1, inputs, outputs);
 *     ct_session_free(session);
 *
 * Errors. A function that can fail returns a ct_status. CT_OK (0) means success. Otherwise
 * ct_last_error() says what was got, what was expected and how to fix it, and every stream is as it
 * was before the call. No C++ exception leaves the library.
 *
 * Threads. Several threads may call any function at once, also for the same session. Only
 * ct_session_free must not run at the same time as another call. While one thread steps stream a,
 * other threads can step, copy, clean or close other streams, and open new ones, without waiting.
 * Their calls on stream a wait for the step, and see either all of it or nothing. When new weights
 * are loaded, steps in progress end with the old ones.
 *
 * Fork. A child process may use its copy of a session. A stream that another thread was stepping
 * at the fork is closed in the child.
 *
 * Arrays are contiguous, row-major and little-endian. M is the number of streams of a call, T the
 * number of steps.
 */

#ifndef CONTINUAL_TRANSFORMERS_H_
#define CONTINUAL_TRANSFORMERS_H_

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The version of this header. ct_version() returns the library's. */
#define CT_VERSION_MAJOR 0
#define CT_VERSION_MINOR 2
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

/* A stream's id: always positive. The id of a closed stream is refused for ever. */
typedef int64_t ct_stream;

typedef enum ct_status {
  CT_OK = 0,
  CT_INVALID_ARGUMENT = 1, /* A shape, dtype, value or option that does not fit. */
  CT_BAD_MODEL_FILE = 2,   /* A file that is truncated, of another kind, newer, or corrupt. */
  CT_UNKNOWN_STREAM = 3,   /* An id that never existed, or was closed. */
  CT_TOO_MANY_STREAMS = 4, /* No room for another stream: the session's limit, or memory. */
  CT_OTHER_MODEL = 5,      /* A state or weights of another model, or of another training. */
  CT_IO = 6,               /* A file that cannot be read or written. */
  CT_INTERNAL = 7,         /* A bug in the library. */
  CT_OUT_OF_MEMORY = 8
} ct_status;

typedef enum ct_dtype {
  CT_DTYPE_OF_FILE = 0, /* Only in ct_options: the model file's dtype. */
  CT_FLOAT32 = 1,
  CT_FLOAT64 = 2,
  CT_BFLOAT16 = 3,
  CT_FLOAT16 = 4,
  CT_INT32 = 5,
  CT_INT64 = 6,
  CT_BOOL = 7, /* One byte, 0 or 1. */
  CT_INT8 = 8  /* Only in ct_options, and for a session's rings and kernels. */
} ct_dtype;

/* Options of a session. Start from CT_OPTIONS_DEFAULT: later versions may add fields at the end,
 * and `size` says which fields the caller has. */
typedef struct ct_options {
  size_t size;            /* sizeof(ct_options) */
  int64_t streams;        /* The most streams open at once; 0: no limit. */
  int64_t threads;        /* Threads for one call; 1: only the caller's. */
  ct_dtype cache_dtype;   /* Keys and values: CT_FLOAT32, CT_BFLOAT16, CT_FLOAT16, CT_INT8;
                           * CT_FLOAT64. */
  ct_dtype weights_dtype; /* Dense kernels: CT_FLOAT32, CT_BFLOAT16, CT_INT8; CT_FLOAT64. */
  const char* device;     /* "cpu", or "cuda:0" and so on: a GPU. NULL: "cpu". */
} ct_options;

#define CT_OPTIONS_DEFAULT {sizeof(ct_options), 0, 1, CT_DTYPE_OF_FILE, CT_DTYPE_OF_FILE, NULL}

/* Returns the library's version, for example "0.2.0". */
CT_API const char* ct_version(void);

/* Returns the message of the calling thread's last error, or "" if there was none. The text is
 * valid until the thread's next error. */
CT_API const char* ct_last_error(void);

/* ---- Sessions ---- */

/* Loads a model file. The file is mapped into memory, and its weights are copied into the layout
 * that suits the processor. `options` NULL: the defaults. On error *session is NULL.
 * Errors: CT_IO, CT_BAD_MODEL_FILE; CT_INVALID_ARGUMENT for options that do not fit the model. */
CT_API ct_status ct_session_load(const char* path, const ct_options* options, ct_session** session);

/* Loads a model file from its bytes, which are copied. */
CT_API ct_status ct_session_load_memory(const void* data, size_t bytes, const ct_options* options,
                                        ct_session** session);

/* Frees a session and closes its streams. NULL is fine. */
CT_API void ct_session_free(ct_session* session);

/* Writes the model file with the current weights, completely or not at all. Error: CT_IO. */
CT_API ct_status ct_session_save(const ct_session* session, const char* path);

/* Replaces the weights with those of a file of the same model. Streams continue with the new ones.
 * Errors: CT_IO, CT_BAD_MODEL_FILE, CT_OTHER_MODEL. The session then keeps the old weights. */
CT_API ct_status ct_session_load_weights(ct_session* session, const char* path);
CT_API ct_status ct_session_load_weights_memory(ct_session* session, const void* data,
                                                size_t bytes);

/* ---- Streams ---- */

/* Opens `count` streams, all or none, and writes their ids to streams[count]. The cost does not
 * depend on how many are open. Does not wait for steps. Error: CT_TOO_MANY_STREAMS. */
CT_API ct_status ct_session_open(ct_session* session, int64_t count, ct_stream* streams);

/* Closes streams, all or none. Waits for steps in progress on them. Errors: CT_UNKNOWN_STREAM,
 * CT_INVALID_ARGUMENT if one is named twice. */
CT_API ct_status ct_session_close(ct_session* session, const ct_stream* streams, int64_t count);

/* Takes one step of `count` streams, which must be distinct.
 *
 * streams: [M]. NULL: the first M default streams. The session opens a default stream when it is
 *   first needed, and again after it was closed.
 * inputs:  one pointer per input of the model, to an array [M, ...]: see ct_session_input.
 * outputs: one pointer per output, to room for an array [M, ...]; NULL: not wanted. Inputs and
 *   outputs must not overlap. In a session on a GPU, both may be in its memory, except inputs of
 *   whole numbers: these are checked. The step waits for what is on CUDA's default stream.
 *
 * M = 0 does nothing. A step allocates no memory after a first one with as many streams. Until a
 * stream has taken ct_session_receptive_field steps, its window is not full, and attention uses the
 * steps that exist.
 * Errors: CT_UNKNOWN_STREAM; CT_TOO_MANY_STREAMS for default streams; CT_INVALID_ARGUMENT for a
 * stream named twice, or a token outside an embedding's table. */
CT_API ct_status ct_session_step(ct_session* session, const ct_stream* streams, int64_t count,
                                 const void* const* inputs, void* const* outputs);

/* Takes `steps` steps of each stream: arrays are [M, T, ...], each stream's steps in order.
 * key_mask: [M, T], false for a gap: no query attends to that step's key, now or later. NULL: no
 *   gaps. */
CT_API ct_status ct_session_steps(ct_session* session, const ct_stream* streams, int64_t count,
                                  int64_t steps, const void* const* inputs, void* const* outputs,
                                  const bool* key_mask);

/* Resets streams, all or none: they begin again. Waits for steps in progress on them.
 * Errors: CT_UNKNOWN_STREAM, CT_INVALID_ARGUMENT if one is named twice. */
CT_API ct_status ct_session_clean(ct_session* session, const ct_stream* streams, int64_t count);

/* Resets all open streams, one after the other. */
CT_API ct_status ct_session_clean_all(ct_session* session);

/* Writes to positions[count] how many steps each stream has taken. Does not wait: a step in
 * progress is not counted. streams NULL: the first `count` default streams, with 0 for one that is
 * not open. Error: CT_UNKNOWN_STREAM. */
CT_API ct_status ct_session_positions(const ct_session* session, const ct_stream* streams,
                                      int64_t count, int64_t* positions);

/* Writes to ready[count] whether each stream's window is full: it has taken at least
 * ct_session_receptive_field steps. Otherwise like ct_session_positions. */
CT_API ct_status ct_session_ready(const ct_session* session, const ct_stream* streams,
                                  int64_t count, bool* ready);

/* Returns the number of open streams. */
CT_API int64_t ct_session_open_streams(const ct_session* session);

/* ---- Copies of streams ---- */

/* Returns the size of a copy of one stream, in bytes. */
CT_API int64_t ct_session_state_bytes(const ct_session* session);

/* Copies one stream to state[bytes]. Waits for a step in progress on it. `bytes` must be
 * ct_session_state_bytes. A copy is the same on every machine. It begins with fingerprints of the
 * model and its weights. Errors: CT_UNKNOWN_STREAM, CT_INVALID_ARGUMENT. */
CT_API ct_status ct_session_get_state(const ct_session* session, ct_stream stream, void* state,
                                      int64_t bytes);

/* Restores copies into `count` streams, all or none: everything is checked before the first one
 * changes. states: [count] pointers, bytes: [count].
 * Errors: CT_UNKNOWN_STREAM; CT_OTHER_MODEL for a copy of another model, or, unless other_weights
 * is true, of the same model with other weights; CT_INVALID_ARGUMENT for bytes that are not a
 * complete copy, or a stream named twice. */
CT_API ct_status ct_session_set_states(ct_session* session, const ct_stream* streams, int64_t count,
                                       const void* const* states, const int64_t* bytes,
                                       bool other_weights);

/* The same for one stream. */
CT_API ct_status ct_session_set_state(ct_session* session, ct_stream stream, const void* state,
                                      int64_t bytes, bool other_weights);

/* ---- The model ---- */

/* An input or output of the model. */
typedef struct ct_value {
  const char* name; /* `name` and `shape` are valid as long as the session. */
  ct_dtype dtype;
  int64_t rank;
  const int64_t* shape; /* [rank], for one step of one stream. */
  int64_t elements;     /* For one step of one stream. */
  int64_t bytes;        /* For one step of one stream. */
} ct_value;

/* Return the number of inputs and outputs. */
CT_API int64_t ct_session_inputs(const ct_session* session);
CT_API int64_t ct_session_outputs(const ct_session* session);

/* Describes input or output number i. Error: CT_INVALID_ARGUMENT. */
CT_API ct_status ct_session_input(const ct_session* session, int64_t i, ct_value* value);
CT_API ct_status ct_session_output(const ct_session* session, int64_t i, ct_value* value);

/* Returns the model's name. It and the plan are valid as long as the session. */
CT_API const char* ct_session_name(const ct_session* session);
/* Returns the plan of the model file, as JSON. */
CT_API const char* ct_session_plan(const ct_session* session);
/* Returns the number of steps that an output depends on, including the newest. */
CT_API int64_t ct_session_receptive_field(const ct_session* session);
/* Returns the number of steps between an input and its output. */
CT_API int64_t ct_session_delay(const ct_session* session);
/* Return the dtypes of cached keys and values, and of dense kernels. */
CT_API ct_dtype ct_session_cache_dtype(const ct_session* session);
CT_API ct_dtype ct_session_weights_dtype(const ct_session* session);
/* Return the fingerprints in copies of streams: a hash of the plan and the cache dtype, and a hash
 * of the weights. */
CT_API uint64_t ct_session_plan_fingerprint(const ct_session* session);
CT_API uint64_t ct_session_weights_fingerprint(const ct_session* session);
/* Estimates how long a call takes on one thread, in nanoseconds. */
CT_API int64_t ct_session_estimate(const ct_session* session, int64_t streams, int64_t steps);

/* The memory of a session, in bytes. */
typedef struct ct_memory {
  int64_t weights;          /* The weights in the layout that steps use. */
  int64_t model_file;       /* The file, mapped or copied. */
  int64_t streams;          /* Blocks of streams that were touched and not unmapped since. */
  int64_t streams_overhead; /* Bookkeeping of the streams. */
  int64_t arenas;           /* The working memory of calls. */
} ct_memory;

/* Writes a ct_memory of `size` bytes, sizeof(ct_memory). Error: CT_INVALID_ARGUMENT. */
CT_API ct_status ct_session_memory(const ct_session* session, ct_memory* memory, size_t size);

#ifdef __cplusplus
}
#endif

#endif /* CONTINUAL_TRANSFORMERS_H_ */
