// Command kubecerts writes what a throw-away API server needs: a CA, a serving pair, a client pair and service-account keys.
// usage: kubecerts DIR
package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

func write(dir, name, kind string, der []byte) {
	block := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(filepath.Join(dir, name), block, 0o600); err != nil {
		panic(err)
	}
}

func key(dir, name string) *ecdsa.PrivateKey {
	k := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	write(dir, name, "EC PRIVATE KEY", must(x509.MarshalECPrivateKey(k)))
	return k
}

func main() {
	dir := os.Args[1]
	serial := int64(0)
	template := func(subject pkix.Name) *x509.Certificate {
		serial++
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano() + serial), Subject: subject,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0),
			KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		}
	}

	caKey := key(dir, "ca.key")
	ca := template(pkix.Name{CommonName: "arks-test-ca"})
	ca.IsCA, ca.KeyUsage = true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	caDER := must(x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey))
	write(dir, "ca.crt", "CERTIFICATE", caDER)
	ca = must(x509.ParseCertificate(caDER))

	issue := func(name string, cert *x509.Certificate) {
		k := key(dir, name+".key")
		write(dir, name+".crt", "CERTIFICATE", must(x509.CreateCertificate(rand.Reader, cert, ca, k.Public(), caKey)))
	}
	server := template(pkix.Name{CommonName: "kube-apiserver"})
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	server.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1)}
	server.DNSNames = []string{"localhost", "kubernetes.default.svc"}
	issue("apiserver", server)
	client := template(pkix.Name{CommonName: "certificate-admin", Organization: []string{"system:masters"}})
	client.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	issue("client", client)

	sa := key(dir, "sa.key")
	write(dir, "sa.pub", "PUBLIC KEY", must(x509.MarshalPKIXPublicKey(sa.Public())))
}
