/* For QV_PORTABLE: what static libraries refer to, that Debian has no static library of, and that
 * Quiver never uses: Kerberos in libzmq, TLS in libmicrohttpd, socket activation in czmq. What the
 * libraries call when they start succeeds and does nothing; anything else ends the program with a
 * word. */
#include <stdio.h>
#include <stdlib.h>

#define UNUSED(X)                                                                                  \
    X(gnutls_alpn_set_protocols)                                                                   \
    X(gnutls_bye)                                                                                  \
    X(gnutls_certificate_allocate_credentials) X(gnutls_certificate_free_credentials) X(           \
        gnutls_certificate_server_set_request) X(gnutls_certificate_set_dh_params)                 \
        X(gnutls_certificate_set_retrieve_function2) X(gnutls_certificate_set_retrieve_function3)  \
            X(gnutls_certificate_set_x509_key_mem) X(gnutls_certificate_set_x509_key_mem2) X(      \
                gnutls_certificate_set_x509_trust_mem) X(gnutls_cipher_get)                        \
                X(gnutls_credentials_set) X(gnutls_deinit) X(gnutls_dh_params_deinit) X(           \
                    gnutls_dh_params_import_pkcs3) X(gnutls_dh_params_init) X(gnutls_handshake)    \
                    X(gnutls_init) X(gnutls_malloc) X(gnutls_priority_deinit)                      \
                        X(gnutls_priority_init) X(gnutls_priority_set) X(                          \
                            gnutls_protocol_get_version) X(gnutls_psk_allocate_server_credentials) \
                            X(gnutls_psk_free_server_credentials)                                  \
                                X(gnutls_psk_set_server_credentials_function)                      \
                                    X(gnutls_record_check_pending) X(gnutls_record_get_direction)  \
                                        X(gnutls_record_recv) X(gnutls_record_send)                \
                                            X(gnutls_session_get_ptr) X(gnutls_session_set_ptr)    \
                                                X(gnutls_strerror) X(gnutls_transport_set_int2)    \
                                                    X(gss_accept_sec_context) X(gss_acquire_cred)  \
                                                        X(gss_delete_sec_context)                  \
                                                            X(gss_display_name) X(gss_import_name) \
                                                                X(gss_init_sec_context)            \
                                                                    X(gss_release_buffer)          \
                                                                        X(gss_release_cred)        \
                                                                            X(gss_release_name)    \
                                                                                X(gss_unwrap)      \
                                                                                    X(gss_wrap)

#define STUB(name)                                                                                 \
    long name(void);                                                                               \
    long name(void)                                                                                \
    {                                                                                              \
        fprintf(stderr, "%s is not in this portable build\n", #name);                              \
        abort();                                                                                   \
    }

UNUSED(STUB)

int gnutls_global_init(void);
int gnutls_global_init(void)
{
    return 0;
}

void gnutls_global_deinit(void);
void gnutls_global_deinit(void) {}

const char *gnutls_check_version(const char *least);
const char *gnutls_check_version(const char *least)
{
    return least != NULL ? least : "0";
}

int sd_listen_fds(int unset);
int sd_listen_fds(int unset)
{
    (void)unset;
    return 0;
}

int sd_is_socket_inet(void);
int sd_is_socket_inet(void)
{
    return 0;
}

int sd_is_socket_unix(void);
int sd_is_socket_unix(void)
{
    return 0;
}

/* Names of kinds of GSSAPI names: data, not functions. */
void *GSS_C_NT_USER_NAME, *GSS_C_NT_HOSTBASED_SERVICE;
